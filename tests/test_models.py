"""Networks: sizes as the references state them, any input, initialisation, forward's contract."""

import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from engine import layers

# The smallest square that each network takes.
SMALLEST = {
    "cnn": 8,
    "cnn-wen2016": 12,
    "bn-deep": 16,
    "bn-shallow": 8,
    "bn-fast": 28,
    "bn-images": 17,
    "face-resnet": 48,
}


def shapes(model, kind):
    return [tuple(module.weight.shape) for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    "name, image_size, in_channels, channels, embedding",
    [
        ("cnn", 28, 1, [32, 32, 64, 64, 128, 128], 1152),
        ("cnn", 32, 3, [32, 32, 64, 64, 128, 128], 2048),
        ("cnn-wen2016", 28, 1, [32, 32, 64, 64, 128, 128], 1152),
        ("bn-deep", 28, 1, [32, 64, 128, 256, 512, 512, 256, 128, 64], 64),
        ("bn-deep", 32, 3, [32, 64, 128, 256, 512, 512, 256, 128, 64], 256),
        ("bn-shallow", 28, 1, [32, 64, 128, 256, 512, 512], 4608),
        ("bn-fast", 28, 1, [16, 32, 64, 64], 256),
        ("bn-fast", 32, 3, [16, 32, 64, 64], 256),
        ("bn-images", 32, 3, [24, 64, 64, 256, 256, 256, 256], 256),
        ("bn-images", 64, 3, [24, 64, 64, 256, 256, 256, 256], 256),
    ],
)
def test_layers_are_those_of_the_reference(name, image_size, in_channels, channels, embedding):
    model = models.create(name, 10, in_channels, image_size)
    inputs = [in_channels, *channels[:-1]]
    kernels = {"bn-fast": [5, 5, 3, 3], "bn-images": [2, *[3] * 6]}.get(name, [5] * len(channels))
    assert shapes(model, nn.Conv2d) == [
        (c, i, k, k) for i, c, k in zip(inputs, channels, kernels, strict=True)
    ]
    assert shapes(model, nn.Linear) == [(2, embedding), (10, 2)]
    if name.startswith("bn"):
        assert shapes(model, nn.BatchNorm2d) == [(c,) for c in channels] and not shapes(
            model, nn.PReLU
        )
        assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))
    else:
        per_channel = name == "cnn-wen2016"
        assert shapes(model, nn.PReLU) == [((c if per_channel else 1),) for c in [*channels, 2]]
        assert all((m.weight == 0.25).all() for m in model.modules() if isinstance(m, nn.PReLU))
    assert (model.classifier.bias is None) == (name == "cnn-wen2016")


def kinds(model, number):
    return [type(layer).__name__ for layer in model.body][:number]


def test_the_fast_network_pools_before_its_activations():
    stage = ["Conv2d", "BatchNorm2d", "ReLU"]
    pooled = ["Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"]
    assert kinds(models.create("bn-fast"), None) == [*pooled, *pooled, *stage, *pooled]
    assert kinds(models.create("bn-shallow"), 7) == [*stage, *stage, "MaxPool2d"]


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize(
    "channels, size, classes, dim", [(1, 28, 10, 2), (3, (32, 44), 100, 5), (5, (41, 30), 3, 1)]
)
def test_forward_gives_features_and_the_logits_of_them(name, channels, size, classes, dim):
    if name == "resnet18-small":
        channels = min(channels, 3)
    if name == "face-resnet":
        size = (49, 68)
    model = models.create(name, classes, channels, size, dim).eval()
    height, width = (size, size) if isinstance(size, int) else size
    features, logits = model(torch.randn(3, channels, height, width))
    assert features.shape == (3, dim) and logits.shape == (3, classes)
    assert torch.equal(logits, model.classifier(features))


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_under_autocast_features_and_logits_are_no_bfloat16_numbers(name):
    size = max(28, SMALLEST.get(name, 0))
    model = models.create(name, image_size=size).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(8, 1, size, size))
    for values in outputs:
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_default_init_draws_layer_by_layer_from_the_global_generator():
    torch.manual_seed(7)
    model = models.create("cnn")
    torch.manual_seed(7)
    for (out, inside), layer in zip(
        [(32, 1), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)],
        [m for m in model.modules() if isinstance(m, nn.Conv2d)],
        strict=True,
    ):
        oracle = nn.Conv2d(inside, out, 5)
        assert torch.equal(oracle.weight, layer.weight) and torch.equal(oracle.bias, layer.bias)
    for oracle, layer in (
        (nn.Linear(1152, 2), model.embedding[0]),
        (nn.Linear(2, 10), model.classifier),
    ):
        assert torch.equal(oracle.weight, layer.weight) and torch.equal(oracle.bias, layer.bias)


def test_xavier_is_uniform_within_its_bound_and_has_zero_biases():
    model = models.create("cnn-wen2016", init="xavier")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = math.sqrt(3 / layer.weight[0].numel())
            assert layer.weight.abs().max() <= bound
            if layer.weight.numel() > 500:
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert layer.bias is None or (layer.bias == 0).all()
        elif isinstance(layer, nn.PReLU):
            assert (layer.weight == 0.25).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_bn_images_begins_as_an_orthonormal_basis_of_patches_and_as_the_identity(channels):
    convolutions = [
        each
        for each in models.create("bn-images", in_channels=channels).modules()
        if isinstance(each, nn.Conv2d)
    ]
    images, size = torch.rand(2, channels, 2, 2), 4 * channels
    projected, negative, rest = convolutions[0](images)[:, :, 0, 0].tensor_split(
        [size, 2 * size], dim=1
    )
    assert torch.allclose(projected.square().sum(1), images.square().sum((1, 2, 3)))
    assert torch.allclose(projected[:, 0], images.sum((1, 2, 3)) / size**0.5)  # the mean of a patch
    assert torch.allclose(negative, -projected[:, : negative.shape[1]])
    assert rest.shape[1] == max(24 - 2 * size, 0)
    for layer in convolutions[1:]:
        inputs = torch.rand(2, layer.in_channels, 5, 5)
        assert torch.allclose(layer(inputs)[:, : layer.in_channels], inputs, atol=1e-6)


@pytest.mark.parametrize("name, smallest", SMALLEST.items())
def test_images_too_small_for_the_pools_are_refused(name, smallest):
    models.create(name, image_size=smallest)
    small = smallest - 1
    with pytest.raises(models.ModelError, match=f"images of {small} x {small} pixels"):
        models.create(name, image_size=small)
    for size in (small // 2, 300), (300, small // 2):
        with pytest.raises(models.ModelError, match=f"images of {size[0]} x {size[1]} pixels"):
            models.create(name, image_size=size)


# What references.md says of the authors' Caffe files: channels, height, width after each stage.
FACE_SIZES = [
    (32, 110, 94),
    (64, 108, 92),
    (64, 54, 46),
    (128, 52, 44),
    (128, 26, 22),
    (256, 24, 20),
    (256, 12, 10),
    (512, 10, 8),
    (512, 5, 4),
]


def test_face_resnet_is_the_papers():
    """3x3 convolutions throughout; 1, 2, 5 and 3 blocks; a slope for each channel."""
    torch.manual_seed(0)
    model = models.create("face-resnet", 100, 3, (112, 96), 512, init="xavier")
    sizes = []
    for layer in model.body:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            layer.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 112, 96))
    assert sizes == FACE_SIZES
    blocks = [layer.body[0].in_channels for layer in model.body if hasattr(layer, "body")]
    assert blocks == [64] + 2 * [128] + 5 * [256] + 3 * [512]
    inputs = (3, 32, 64, 128, 256)
    outputs = (32, 64, 128, 256, 512)
    plain = sum(9 * i * o + 2 * o for i, o in zip(inputs, outputs, strict=True))  # bias, slope
    residual = sum(2 * (9 * c * c + c) for c in blocks)
    linear = 512 * 5 * 4 * 512 + 512 + 512 * 100 + 100
    assert sum(each.numel() for each in model.parameters()) == plain + residual + linear
    for name, layer in model.named_modules():
        if isinstance(layer, nn.PReLU):
            assert (layer.weight == 0.25).all()
        elif isinstance(layer, layers.SmallConv2d):
            assert layer.bias is None and abs(layer.weight.std().item() - 0.01) < 2e-4, name
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            bound = math.sqrt(3 / layer.weight[0].numel())
            assert bound * 0.98 < layer.weight.abs().max() <= bound and not layer.bias.any(), name
    block = model.body[5]
    images = torch.randn(2, 64, 5, 4)
    expected = images
    for weight, slopes in (block.body[:2], block.body[2:]):
        expected = F.prelu(F.conv2d(expected, weight.weight, padding=1), slopes.weight)
    assert torch.allclose(block(images), images + expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_networks_train_on_a_gpu_with_deterministic_algorithms(name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    size = max(28, SMALLEST.get(name, 0))
    model = models.create(name, image_size=size).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        for values in model(torch.randn(4, 1, size, size, device="cuda")):
            values.square().sum().backward(retain_graph=True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [*sorted(models.MODELS), "resnet18"])
def test_a_network_is_exported_for_batches_of_any_size(name):
    """By torch.export; traced for libtorch; its linear layers quantized."""
    size = max(28, SMALLEST.get(name, 0))
    network = models.create(name, 5, 3, size, 2).eval()
    images = torch.randn(4, 3, size, size)
    expected = [each.detach() for each in network(images)]
    batch = torch.export.Dim("batch")
    exported = torch.export.export(network, (images[:2],), dynamic_shapes=({0: batch},))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these ways are older, and torch says so
        traced = torch.jit.trace(network, images[:1], check_trace=False)
        torch.jit.save(traced, io.BytesIO())
        quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})(images)
    for found in (exported.module()(images), traced(images)):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert [each.shape for each in quantized] == [each.shape for each in expected]


@pytest.mark.parametrize("mode", models.MIRRORS)
def test_features_of_mirror_images(mode):
    model = models.create("cnn", 4, 1, (12, 16), 3).eval()
    images = torch.randn(2, 1, 12, 16)
    features, logits = model(images)
    mirrored = model(images.flip(3))
    found = models.Mirrored(model, mode)(images)
    centers = torch.randn(4, 3)
    assert torch.allclose(found[1], (logits + mirrored[1]) / 2)
    if mode == "mean":
        assert torch.allclose(found[0], (features + mirrored[0]) / 2)
        assert models.Mirrored(model, mode).centers(centers) is centers
    else:
        assert torch.equal(found[0], torch.cat([features, mirrored[0]], 1))
        assert models.Mirrored(model, mode).centers(centers).tolist() == [
            2 * row for row in centers.tolist()
        ]
    with pytest.raises(models.ModelError, match="mean, concat, got both"):
        models.Mirrored(model, "both")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "slopes, shape",
    [(1, (5, 6, 7, 7)), (6, (5, 6, 7, 7)), (1, (5, 2)), (2, (5, 2)), (6, (0, 6, 2, 2))],
)
def test_prelu_has_the_values_and_gradients_of_torchs(slopes, shape, dtype, channels_last):
    """Also at 0, where it is that of the negative side, and for slopes of any sign and size."""
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.randint(-3, 4, shape, generator=generator).to(dtype) * 0.37
    )  # a seventh of them zeros
    if channels_last and len(shape) == 4:
        images = images.to(memory_format=torch.channels_last)
    images[:1, :1] = -0.0
    gradients = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for kind in (nn.PReLU, models.PReLU):
        layer, inputs = kind(slopes).to(dtype), images.clone().requires_grad_()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.25, -0.5, 1.5, 0.0, 0.3, 1.0])[:slopes])
        outputs = layer(inputs)
        outputs.backward(gradients)
        results.append((outputs, inputs.grad, layer.weight.grad))
    theirs, ours = results
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert ours[1].stride() == theirs[1].stride()
    assert ours[2].shape == theirs[2].shape and ours[2].dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert torch.allclose(ours[2], theirs[2], rtol=2 * rounding, atol=8 * rounding)


def test_prelu_under_autocast_has_the_gradients_of_torchs():
    results = []
    for kind in (nn.PReLU, models.PReLU):
        torch.manual_seed(0)
        network = nn.Sequential(kind(3), nn.Conv2d(3, 4, 3), kind(4)).to(
            memory_format=torch.channels_last
        )
        images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(images)
        assert outputs.dtype == torch.bfloat16
        outputs.float().square().sum().backward()
        results.append(
            [outputs, images.grad, *(parameter.grad for parameter in network.parameters())]
        )
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())


def test_prelu_draws_nothing_and_has_torchs_state():
    state = torch.get_rng_state()
    layer = models.PReLU(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(layer.state_dict()) == ["weight"] and (layer.weight == 0.25).all()


@pytest.mark.parametrize(
    "name, width", [("resnet18", 512), ("squeezenet1_1", 512), ("shufflenet_v2_x0_5", 1024)]
)
def test_a_torchvision_network_gives_features_in_place_of_its_last_layer(name, width):
    for channels, dim in ((3, 7), (1, 7), (3, 0)):
        model = models.create(name, 5, channels, 40, dim).eval()
        images = torch.rand(2, channels, 40, 40)
        features, logits = model(images)
        assert features.shape == (2, dim or width) and logits.shape == (2, 5)
        assert torch.equal(logits, model.classifier(features))
        theirs = torchvision.models.get_model(name, num_classes=width)
        theirs.load_state_dict(model.body.state_dict(), strict=False)
        last = [each for each in theirs.modules() if isinstance(each, nn.Linear | nn.Conv2d)][-1]
        with torch.no_grad():
            last.weight.copy_(torch.eye(width).view_as(last.weight))
            last.bias.zero_()
            oracle = model.embedding(theirs.eval()(images.expand(-1, 3, -1, -1)))
        assert torch.allclose(features, oracle, atol=1e-5)


def test_the_small_stem_keeps_the_pixels_of_small_images():
    model = models.create("resnet18-small", 10, 3, 32, 64)
    body = nn.Sequential(model.body.conv1, model.body.maxpool, model.body.layer1)
    assert body(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    plain = models.create("resnet18", 10, 3, 32, 64)
    assert nn.Sequential(plain.body.conv1, plain.body.maxpool)(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        64,
        8,
        8,
    )


def test_a_last_batch_of_one_image_trains_where_batch_norm_has_one_pixel():
    model = models.create("resnet18", 10, 3, 32, 4).train()
    features, logits = model(torch.rand(1, 3, 32, 32))
    logits.sum().backward()
    assert features.shape == (1, 4) and all(
        parameter.grad.isfinite().all() for parameter in model.parameters()
    )


def test_images_that_a_torchvision_network_cannot_take_are_refused():
    for name, channels, size, message in (
        ("inception_v3", 3, 32, "images of 32 x 32 pixels"),
        ("resnet18", 4, 32, "1 or 3 channels"),
    ):
        with pytest.raises(models.ModelError, match=message) as error:
            models.create(name, 10, channels, size)
        assert "\n" not in str(error.value)
    with pytest.raises(models.ModelError, match="--feat-dim must be at least 1"):
        models.create("bn-fast", feat_dim=0)


def test_pretrained_weights_are_torchvisions_but_for_the_last_layer(monkeypatch):
    torch.manual_seed(5)
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights
    )
    model = models.create("resnet18", 5, 3, 40, 7, pretrained=True)
    assert weights.keys() - model.body.state_dict().keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in model.body.state_dict().items())
    assert models.pretrained_scaling("resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert models.pretrained_scaling("efficientnet_v2_l") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_pretrained_weights_without_a_network_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torch.hub.urlopen", lambda *_: (_ for _ in ()).throw(OSError("Name or service\nnot known"))
    )
    with pytest.raises(models.ModelError) as error:
        models.create("resnet18", 5, 3, 40, 7, pretrained=True)
    assert str(error.value).startswith("the weights of resnet18 could") and "\n" not in str(
        error.value
    )

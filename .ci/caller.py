"""A caller of the installed loss, whose mistakes a type checker is told to ignore, and finds."""

import torch

from center_loss import CenterLoss

features, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 2])
center_loss = CenterLoss(num_classes=3, feat_dim=2, device="cpu", radius=0.5, ignore_index=-1)
loss: torch.Tensor = center_loss(features, labels)
center_loss.update_centers(features, labels, alpha=0.5)
center_loss.start_from((features, labels) for _ in range(2))
center_loss.rescale_center_grad(weight=0.1, lr_ratio=2)
center_loss.rescale_center_grad(alpha=0.1)
nearest: torch.Tensor = center_loss.distances(features).argmin(1)

CenterLoss("three")  # type: ignore[arg-type]
center_loss.update_centers(features)  # type: ignore[call-arg]
center_loss.start_from(features, labels)  # type: ignore[call-arg]
number: float = center_loss.distances(features)  # type: ignore[assignment]

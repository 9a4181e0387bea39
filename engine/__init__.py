"""Between an image and a metric: tensors, networks and losses; no flags, no files, no prints."""

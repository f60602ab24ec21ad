"""Makes: COCO data checked, written as WebDataset tars with a manifest, or drawn."""

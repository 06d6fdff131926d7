"""The Pallas Mosaic GPU kernel for Hopper: a leaf that knows arrays and integers only."""

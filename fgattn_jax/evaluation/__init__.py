"""What skipping costs: picture quality, negligible shares, agreement of masks; pictures, tables, the study."""

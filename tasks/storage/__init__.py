"""Where the bytes are: folders on disks and in stores, downloads ahead of their use, temporary space."""

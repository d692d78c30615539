"""NBMF: records kept small, searchable and trustworthy, encoded on the device."""

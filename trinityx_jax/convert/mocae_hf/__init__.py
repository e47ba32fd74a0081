"""The PyTorch modelling file that ships inside an exported MoCaE model; importing this package loads no torch."""

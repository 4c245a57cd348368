"""Our side of the golden cases, one module per system or group of kinds."""

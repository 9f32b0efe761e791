"""The intermediate graph: fx of ATen operations, named by the user's modules."""

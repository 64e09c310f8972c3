"""What a projected step costs against the plain one: `python -m benchmarks`."""

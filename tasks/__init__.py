"""The stages of a run, one file each: a plain function that does the work and a thin Prefect task around it."""

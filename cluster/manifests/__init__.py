"""Files that bring up a cluster for a run: KubeRay resources, Ray cluster-launcher YAML, a Slurm script, container files."""

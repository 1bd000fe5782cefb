"""What a run is: typed sections, YAML files, overrides, and checks that report every fault."""

"""Where ranks are: sizes, process groups, devices and collectives."""

import warnings

# Megatron-Core says four times at import that optional packages are missing: the run's own table
# says what was picked. And it calls collectives by names that torch has begun to rename.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)

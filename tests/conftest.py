"""Settings that every test shares."""

import os

# Set before anything loads huggingface_hub, which reads them once: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings  # noqa: E402

# A busy machine is no failure, and a test that fails once must fail again.
settings.register_profile("probe", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("probe")

"""What several test files share."""

import os

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU. Read when they are defined, so it is set for all tests.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Triton 3.9 warns where it is unset; this is what it then takes.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# LightningCLI 2.6 calls what jsonargparse 4.49 deprecates; as errors, these would end up in its own error messages.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)

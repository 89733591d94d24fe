"""inspect: what it says is what is there, for bundles, engines and data sets."""

import json
import pty
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineRecord
from uni_instruct.networks.build import build_denoiser

Cli = Callable[..., tuple[int, str, str]]

from uni_instruct.bundle import Bundle as Bundle
from uni_instruct.engine import open_engine as open_engine
from uni_instruct.evaluate.evaluator import evaluate_images as evaluate_images
from uni_instruct.export.api import export_bundle as export_bundle
from uni_instruct.generate import generate_images as generate_images
from uni_instruct.generate import mix_classes as mix_classes
from uni_instruct.sampling import read_samples as read_samples
from uni_instruct.train.api import train_recipe as train_recipe

__version__: str

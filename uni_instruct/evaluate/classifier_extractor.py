"""The classifier as a feature extractor that torch-fidelity finds by name. Importing this module registers it."""

from pathlib import Path

from torch import Tensor

from uni_instruct.evaluate.classifier import open_features
from uni_instruct.evaluate.fidelity import fidelity

CLASSIFIER = "uni-instruct-classifier"
_fidelity = fidelity()
_LAYERS = ("features", "logits")


class ClassifierExtractor(_fidelity.FeatureExtractorBase):  # type: ignore[name-defined]
    """Layers 'features' and 'logits' of the classifier whose file is given as feature_extractor_weights_path."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **options: object):
        # options: what torch-fidelity passes to every extractor, such as whether to compile it.
        super().__init__(name, features_list)
        self.network = open_features(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the layers."""
        return _LAYERS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The inception score reads logits, every other metric features."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """It is too small to gain."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        """None, as it cannot be compiled."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested layers, in order, of images uint8 [B, C, H, W]."""
        outputs = dict(zip(_LAYERS, self.network(images), strict=True))
        return tuple(outputs[layer] for layer in self.features_list)


_fidelity.register_feature_extractor(CLASSIFIER, ClassifierExtractor)

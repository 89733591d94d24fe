"""The usage section that all model cards share."""

from uni_instruct.bundle import USUAL_VAE
from uni_instruct.spec import ModelSpec


def usage(spec: ModelSpec) -> str:
    """Commands to run in the bundle's folder, one a line.

    For pictures: generate and, for a one-step generator, serve. For latents: save them and, for a one-step generator, add a
    decoder.
    """
    out, more = (
        ("images/", "serve .") if spec.makes_pictures else ("latents.npz", f"import . --decoder {USUAL_VAE} --out pictures")
    )
    generate = f"uni-instruct generate . --seeds 0-63 --out {out}"
    return generate if spec.steps > 1 else f"{generate}\nuni-instruct {more}"

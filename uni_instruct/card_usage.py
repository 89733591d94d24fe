"""What a model card says of use, whoever writes the card."""

from uni_instruct.bundle import USUAL_VAE
from uni_instruct.spec import ModelSpec


def usage(spec: ModelSpec) -> str:
    """Commands for the bundle's folder, a line each: of latents, how they are written and how they get a decoder."""
    out, more = (
        ("images/", "serve .") if spec.makes_pictures else ("latents.npz", f"import . --decoder {USUAL_VAE} --out pictures")
    )
    generate = f"uni-instruct generate . --seeds 0-63 --out {out}"
    return generate if spec.steps > 1 else f"{generate}\nuni-instruct {more}"

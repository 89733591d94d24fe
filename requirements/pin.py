"""Prints a pin for everything that uni-instruct[all,test] needs, as installed here: `make pins` writes it to all.txt."""

from uni_instruct.serve.pins import needed, pin

BUILD = {"setuptools", "wheel"}  # the editable install is built with what is pinned
EXTRAS = {"train", "export", "serve", "evaluate", "benchmark", "tensorrt-rtx", "test"}


def main() -> None:
    """One line each, by name."""
    for name in sorted(BUILD | needed(EXTRAS), key=str.lower):
        print(pin(name))


if __name__ == "__main__":
    main()

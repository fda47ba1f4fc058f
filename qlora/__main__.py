"""`python -m qlora`, and so `accelerate launch -m qlora train …` and `torchrun -m qlora train …`."""

from qlora.cli.main import main

if __name__ == "__main__":
    main()

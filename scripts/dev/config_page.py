"""Write docs/config.md from the sections of a config: `python -m scripts.dev.config_page`."""

from pathlib import Path

from qlora.config.pages import reference_page

PAGE = Path(__file__).parents[2] / "docs" / "config.md"

if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")

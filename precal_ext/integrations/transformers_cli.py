"""transformers' own commands, which know precal's format here.

``python -m precal_ext.integrations.transformers_cli serve DIR``: importing the package has registered it.
"""

from __future__ import annotations

if __name__ == "__main__":
    try:
        from transformers.cli.transformers import main
    except ImportError:  # version 4
        from transformers.commands.transformers_cli import main

    main()

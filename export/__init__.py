"""Export: build engines from a bundle. An engine is kept only if it agrees with torch."""

"""Bundle -> engines, each admitted only when it agrees with torch."""

"""A plan for people: text, HTML, and several topologies side by side."""

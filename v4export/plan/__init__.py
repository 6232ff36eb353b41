"""What a build, and what running its result, will take: worked out from shapes and formats, before any work."""

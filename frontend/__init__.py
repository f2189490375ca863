"""The user's process: text in, text out, on asyncio. Never imports torch."""

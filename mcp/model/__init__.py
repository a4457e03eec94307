"""What is decided, and in which words: pure code on attrs and the pure standard library, that never looks at a clock."""

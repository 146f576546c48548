"""Everything that measures; results/ holds what was measured."""

"""A model judges the answers of base and tuned model: in pairs, in both orders, and one by one by a rubric."""

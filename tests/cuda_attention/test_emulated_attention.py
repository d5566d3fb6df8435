from __future__ import annotations

from tests.ops import test_attention as shared

FAMILY = "attention"

attend = shared.attend
test_decode_attention = shared.test_decode_attention
test_prefill_attention = shared.test_prefill_attention
test_extreme_scores = shared.test_extreme_scores
test_nan_query_stays_in_its_head = shared.test_nan_query_stays_in_its_head
test_a_sequence_does_not_depend_on_its_batch = shared.test_a_sequence_does_not_depend_on_its_batch

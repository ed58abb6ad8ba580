package main

import (
	"slices"
	"testing"
)

// No ID is mapped twice, whatever the lines in subuid(5), and no ID in them is lost.
func TestDisjoint(t *testing.T) {
	t.Parallel()
	own := idRange{1000, 1}
	for _, c := range []struct{ ranges, want []idRange }{
		{nil, nil},
		{[]idRange{{100000, 65536}, {300000, 10}}, []idRange{{100000, 65536}, {300000, 10}}},
		{[]idRange{{100000, 65536}, {100000, 65536}}, []idRange{{100000, 65536}}},
		{[]idRange{{100, 10}, {105, 10}}, []idRange{{100, 10}, {110, 5}}},
		{[]idRange{{105, 10}, {100, 10}}, []idRange{{105, 10}, {100, 5}}},
		{[]idRange{{105, 1}, {107, 1}, {100, 10}}, []idRange{{105, 1}, {107, 1}, {100, 5}, {106, 1}, {108, 2}}},
		{[]idRange{{990, 20}}, []idRange{{990, 10}, {1001, 9}}},
		{[]idRange{{1000, 1}}, nil},
	} {
		if got := disjoint(own, c.ranges); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, not %v", c.ranges, got, c.want)
		}
	}
}

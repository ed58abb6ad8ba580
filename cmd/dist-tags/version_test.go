package main

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestCompareVersions(t *testing.T) {
	want := strings.Fields("alpine edge edge-2 edge-10 0.9 v1 1.0-alpha 1.0-rc1 1.0-rc2 1.0-rc10 1.0 1.0.0 1.2 1.10 1.10.3-alpine 1.10.3 v1.11 2-beta 2 20240101 99999999999999999999999999 latest")
	for seed := range uint64(20) {
		got := slices.Clone(want)
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(got), func(i, j int) { got[i], got[j] = got[j], got[i] })
		slices.SortStableFunc(got, compareVersions)
		if !slices.Equal(got, want) {
			t.Fatalf("got  %v\nwant %v", got, want)
		}
	}
	for _, a := range want {
		for _, b := range want {
			if compareVersions(a, b) != -compareVersions(b, a) || (compareVersions(a, b) == 0) != (a == b) {
				t.Errorf("%s and %s have no order", a, b)
			}
		}
	}
}

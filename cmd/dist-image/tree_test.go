package main

import (
	"math"
	"testing"
	"unicode/utf8"
)

// The sizes in a manifest may be anything.
func TestBar(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		size, largest int64
		want          int
	}{{0, 1, 0}, {1, 1, 24}, {1, 1000, 1}, {500, 1000, 12}, {-1, 1, 0}, {math.MinInt64, 1, 0}, {math.MaxInt64, math.MaxInt64, 24}, {1 << 60, math.MaxInt64, 3}} {
		if got := utf8.RuneCountInString(bar(c.size, c.largest, 24)); got != c.want {
			t.Errorf("%d of %d: %d characters, not %d", c.size, c.largest, got, c.want)
		}
	}
}

func TestSizeText(t *testing.T) {
	t.Parallel()
	for size, want := range map[int64]string{0: "0 B", 2048: "2.0 KiB", math.MaxInt64: "8.0 EiB", -1: "?", math.MinInt64: "?"} {
		if got := sizeText(size); got != want {
			t.Errorf("%d: %q, not %q", size, got, want)
		}
	}
}

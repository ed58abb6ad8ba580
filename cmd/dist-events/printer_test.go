package main

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestParseTime(t *testing.T) {
	zone := time.FixedZone("east", 3600)
	now := time.Date(2017, 1, 19, 12, 0, 0, 0, zone)
	for s, want := range map[string]time.Time{
		"":                            {},
		"90m":                         now.Add(-90 * time.Minute),
		"0s":                          now,
		"2017-01-18T10:00:00Z":        time.Date(2017, 1, 18, 10, 0, 0, 0, time.UTC),
		"2017-01-18T10:00:00.5+01:00": time.Date(2017, 1, 18, 10, 0, 0, 5e8, zone),
		"2017-01-18T10:00:00":         time.Date(2017, 1, 18, 10, 0, 0, 0, zone),
		"2017-01-18 10:00":            time.Date(2017, 1, 18, 10, 0, 0, 0, zone),
		"2017-01-18":                  time.Date(2017, 1, 18, 0, 0, 0, 0, zone),
	} {
		if got, err := parseTime(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v, not %v", s, got, err, want)
		}
	}
	for _, s := range []string{"yesterday", "-90m", "10", "2017-13-01"} {
		if got, err := parseTime(s, now); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

package main

import (
	"errors"
	"io"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/events"
)

// printer prints the selected events.
type printer struct {
	out    io.Writer
	filter filter.Filter
	since  time.Time
	skip   int // number of events to skip
	left   int // number of events still to print; negative for all
}

// errEnough stops reading when no more events are to be printed.
var errEnough = errors.New("enough")

func (p *printer) wants(e events.Event) (bool, error) {
	if e.Time.Before(p.since) {
		return false, nil
	}
	return p.filter.Match(e)
}

func (p *printer) print(e events.Event, line []byte) error {
	if ok, err := p.wants(e); err != nil || !ok {
		return err
	}
	if p.skip > 0 {
		p.skip--
		return nil
	}
	if _, err := p.out.Write(line); err != nil {
		return err
	}
	if p.left--; p.left == 0 {
		return errEnough
	}
	return nil
}

// times are the accepted formats for local times, besides RFC 3339.
var times = []string{"2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02 15:04", "2006-01-02"}

// parseTime parses a time, or a duration before now. "" is the zero time.
func parseTime(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(s); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	for _, form := range times {
		if t, err := time.ParseInLocation(form, s, now.Location()); err == nil {
			return t, nil
		}
	}
	return time.Time{}, cli.Usagef("--since %q is no time, such as 2006-01-02T15:04:05Z or 2006-01-02, nor a duration, such as 90m", s)
}

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/events"

	"github.com/dustin/go-humanize"
)

// printer prints the selected events.
type printer struct {
	out    io.Writer
	filter filter.Filter
	since  time.Time
	skip   int // number of events to skip
	left   int // number of events still to print; negative for all
	// line, if set, returns the text that is printed for an event instead of its line of the log.
	line    func(events.Event) string
	printed int
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
	p.printed++
	if p.line != nil {
		line = []byte(p.line(e))
	}
	if _, err := p.out.Write(line); err != nil {
		return err
	}
	if p.left--; p.left == 0 {
		return errEnough
	}
	return nil
}

// line returns a line about an event for a person at a terminal, no wider than that.
func line(e events.Event) string {
	words := []string{cmp.Or(e.Name, e.Digest, e.Key, e.Container)}
	add := func(key, value string) {
		if value != "" && value != words[0] {
			words = append(words, key+"="+value)
		}
	}
	if e.Namespace != "default" {
		add("namespace", e.Namespace)
	}
	add("digest", e.Digest)
	if e.Size > 0 {
		add("size", humanize.IBytes(uint64(e.Size)))
	}
	if e.Status != nil {
		add("status", strconv.Itoa(*e.Status))
	}
	for _, field := range []string{"key", "parent", "snapshotter", "container", "exec", "pid", "count"} {
		value, _ := e.Field([]string{field})
		add(field, value)
	}
	add("labels", cli.LabelWords(e.Labels))
	width, _ := cli.IsTerminal(os.Stdout)
	format := time.DateTime
	if 0 < width && width < 80 {
		format = time.TimeOnly
	}
	return cli.Fit(fmt.Sprintf("%s  %-18s  %s", e.Time.Local().Format(format), e.Topic, strings.Join(words, " ")), width) + "\n"
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

package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// rateOver is the time over which the rate that is shown while things move is taken.
const rateOver = 3 * time.Second

// display draws in place on a terminal, and does nothing where there is none.
type display struct {
	out    *os.File
	begin  time.Time
	lines  []int // widths of the lines drawn last
	points []point
}

// point is what had been brought at a time.
type point struct {
	at    time.Time
	bytes int64
}

func newDisplay(out *os.File) *display { return &display{out: out, begin: time.Now()} }

func (d *display) draw(objects []*object, last bool) {
	ws, err := unix.IoctlGetWinsize(int(d.out.Fd()), unix.TIOCGWINSZ)
	if err != nil || len(objects) == 0 {
		return
	}
	width, height := int(ws.Col), int(ws.Row)
	if width == 0 {
		width = 80
	}
	if height == 0 {
		height = 24
	}
	// The last column stays free: some terminals wrap when it is written to.
	lines := d.frame(objects, width-1, height-1, time.Now(), last)

	var b strings.Builder
	if up := d.rows(width); up > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", up)
	}
	b.WriteString("\r")
	d.lines = d.lines[:0]
	for _, l := range lines {
		b.WriteString(l + "\x1b[K\n")
		d.lines = append(d.lines, len(l))
	}
	b.WriteString("\x1b[J")
	_, _ = d.out.WriteString(b.String())
}

// rows is how many rows the last frame takes now that the terminal may be narrower.
func (d *display) rows(width int) int {
	rows := 0
	for _, n := range d.lines {
		rows += max(1, (n+width-1)/width)
	}
	return rows
}

// frame lays the objects and a summary out in so many columns and rows. Where there is no
// room for all, those that move are shown, and the rest is counted.
func (d *display) frame(objects []*object, width, height int, now time.Time, last bool) []string {
	shown := objects
	var hidden []*object
	if room := max(height-3, 1); len(objects) > room && !last {
		shown = nil
		for _, want := range []func(*object) bool{
			func(o *object) bool { return o.state == downloading },
			func(o *object) bool { return o.state == waiting },
			func(o *object) bool { return o.state >= exists },
		} {
			for _, o := range objects {
				switch {
				case !want(o):
				case len(shown) < room-1:
					shown = append(shown, o)
				default:
					hidden = append(hidden, o)
				}
			}
		}
	}
	names := 0
	for _, o := range objects {
		names = max(names, len(o.name))
	}
	var lines []string
	for _, o := range shown {
		lines = append(lines, cut(o.line(names, width), width))
	}
	if len(hidden) > 0 {
		lines = append(lines, cut("and "+count(hidden), width))
	}
	return append(lines, cut(d.summary(objects, now, last), width))
}

func (o *object) line(names, width int) string {
	size := humanize.IBytes(uint64(o.size))
	if o.state == downloading {
		size = humanize.IBytes(uint64(o.offset)) + "/" + size
	}
	head := fmt.Sprintf("%-*s  %-11s", names, o.name, o.state)
	// Sizes take at most "1023 MiB/1023 MiB".
	room := width - len(head) - 2 - 2 - 17
	if room < 10 {
		return head + "  " + size
	}
	return head + "  " + bar(o, min(room, 42)) + "  " + size
}

func bar(o *object, width int) string {
	inner := width - 2
	full := 0
	switch {
	case o.state >= exists:
		full = inner
	case o.size > 0:
		full = int(min(o.offset, o.size) * int64(inner) / o.size)
	}
	fill := strings.Repeat("=", full)
	if o.state == downloading && full < inner {
		fill += ">"
	}
	return fmt.Sprintf("[%-*s]", inner, fill)
}

func count(objects []*object) string {
	var n [done + 1]int
	for _, o := range objects {
		n[o.state]++
	}
	var parts []string
	for _, s := range []state{downloading, waiting, done, exists} {
		switch {
		case n[s] == 0:
		case s == exists:
			parts = append(parts, fmt.Sprintf("%d there already", n[s]))
		default:
			parts = append(parts, fmt.Sprintf("%d %s", n[s], s))
		}
	}
	return strings.Join(parts, ", ")
}

// summary is elapsed time, bytes of all, and the rate of what this run has brought: over the
// last seconds while things move, over all of it at the end.
func (d *display) summary(objects []*object, now time.Time, last bool) string {
	var stored, total, brought int64
	for _, o := range objects {
		stored += min(o.offset, o.size)
		total += o.size
		brought += max(o.offset-o.first, 0)
	}
	d.points = append(d.points, point{now, brought})
	for len(d.points) > 2 && now.Sub(d.points[0].at) > rateOver {
		d.points = d.points[1:]
	}
	elapsed := now.Sub(d.begin)
	from := d.points[0]
	if last {
		from = point{d.begin, 0}
	}
	rate := 0.0
	if span := now.Sub(from.at).Seconds(); span > 0 {
		rate = max(float64(brought-from.bytes), 0) / span
	}
	return fmt.Sprintf("elapsed: %.1fs  total: %s of %s  (%s/s)", elapsed.Seconds(),
		humanize.IBytes(uint64(stored)), humanize.IBytes(uint64(total)), humanize.IBytes(uint64(rate)))
}

func cut(s string, width int) string {
	if len(s) > width {
		return s[:max(width, 0)]
	}
	return s
}

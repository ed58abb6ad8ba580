// Package progress draws on a terminal how objects move.
package progress

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Interval is how often a [Display] is drawn.
const Interval = 100 * time.Millisecond

// State is how far an object is.
type State int

// The states of an object.
const (
	Waiting State = iota
	Moving
	Exists // was there before
	Done
)

func (s State) String() string {
	return [...]string{"waiting", "moving", "exists", "done"}[s]
}

// Object is one line of a display.
type Object struct {
	Name   string
	Size   int64
	State  State
	Offset int64 // bytes that have come
	First  int64 // bytes that had come before
}

// Name returns what a line begins with, such as layer-sha256:0123456789ab.
func Name(d ocispec.Descriptor) string {
	kind := "blob"
	switch t := d.MediaType; {
	case strings.Contains(t, "image.index"), strings.Contains(t, "manifest.list"):
		kind = "index"
	case strings.Contains(t, "manifest"):
		kind = "manifest"
	case strings.Contains(t, "config"), strings.Contains(t, "container.image.v1"):
		kind = "config"
	case strings.Contains(t, "layer"), strings.Contains(t, "rootfs.diff"):
		kind = "layer"
	}
	return fmt.Sprintf("%s-%s:%.12s", kind, d.Digest.Algorithm(), d.Digest.Encoded())
}

// rateOver is the time over which the rate that is shown while things move is taken.
const rateOver = 3 * time.Second

// Display draws in place on a terminal, and does nothing where there is none.
type Display struct {
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

// New returns a display that draws on out.
func New(out *os.File) *Display { return &Display{out: out, begin: time.Now()} }

// Draw draws the objects in the place of those drawn before. The last frame has the rate of the whole time.
func (d *Display) Draw(objects []*Object, last bool) {
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
func (d *Display) rows(width int) int {
	rows := 0
	for _, n := range d.lines {
		rows += max(1, (n+width-1)/width)
	}
	return rows
}

// frame lays the objects and a summary out in so many columns and rows. Where there is no
// room for all, those that move are shown, and the rest is counted.
func (d *Display) frame(objects []*Object, width, height int, now time.Time, last bool) []string {
	shown := objects
	var hidden []*Object
	if room := max(height-3, 1); len(objects) > room {
		shown = nil
		for _, want := range []func(*Object) bool{
			func(o *Object) bool { return o.State == Moving },
			func(o *Object) bool { return o.State == Waiting },
			func(o *Object) bool { return o.State >= Exists },
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
		names = max(names, len(o.Name))
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

func (o *Object) line(names, width int) string {
	size := humanize.IBytes(uint64(o.Size))
	if o.State == Moving {
		size = humanize.IBytes(uint64(o.Offset)) + "/" + size
	}
	head := fmt.Sprintf("%-*s  %-11s", names, o.Name, o.State)
	// Sizes take at most "1023 MiB/1023 MiB".
	room := width - len(head) - 2 - 2 - 17
	if room < 10 {
		return head + "  " + size
	}
	return head + "  " + bar(o, min(room, 42)) + "  " + size
}

func bar(o *Object, width int) string {
	inner := width - 2
	full := 0
	switch {
	case o.State >= Exists:
		full = inner
	case o.Size > 0:
		full = int(min(o.Offset, o.Size) * int64(inner) / o.Size)
	}
	fill := strings.Repeat("=", full)
	if o.State == Moving && full < inner {
		fill += ">"
	}
	return fmt.Sprintf("[%-*s]", inner, fill)
}

func count(objects []*Object) string {
	var n [Done + 1]int
	for _, o := range objects {
		n[o.State]++
	}
	var parts []string
	for _, s := range []State{Moving, Waiting, Done, Exists} {
		switch {
		case n[s] == 0:
		case s == Exists:
			parts = append(parts, fmt.Sprintf("%d there already", n[s]))
		default:
			parts = append(parts, fmt.Sprintf("%d %s", n[s], s))
		}
	}
	return strings.Join(parts, ", ")
}

// summary is elapsed time, bytes of all, the rate of what this run has brought (over the last seconds while things move,
// over all of it at the end), and the time that is left at that rate.
func (d *Display) summary(objects []*Object, now time.Time, last bool) string {
	var stored, total, brought int64
	for _, o := range objects {
		stored += min(o.Offset, o.Size)
		total += o.Size
		brought += max(o.Offset-o.First, 0)
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
	left := ""
	if !last && rate >= 1 && total > stored {
		left = fmt.Sprintf("  left: %s", (time.Duration(float64(total-stored)/rate) * time.Second).String())
	}
	return fmt.Sprintf("elapsed: %.1fs  total: %s of %s  (%s/s)%s", elapsed.Seconds(),
		humanize.IBytes(uint64(stored)), humanize.IBytes(uint64(total)), humanize.IBytes(uint64(rate)), left)
}

func cut(s string, width int) string {
	if len(s) > width {
		return s[:max(width, 0)]
	}
	return s
}

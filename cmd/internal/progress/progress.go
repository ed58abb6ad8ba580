// Package progress shows on a terminal how far a command is: how objects move ([Display]), or one line about a slow step ([Step]).
package progress

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Interval is the time between two frames of a [Display].
const Interval = 100 * time.Millisecond

// State is the state of an object.
type State int

// The states of an object.
const (
	Waiting State = iota
	Moving
	Exists // was there already
	Done
)

func (s State) String() string {
	return [...]string{"waiting", "moving", "exists", "done"}[s]
}

// Object is a line of a display.
type Object struct {
	Name   string
	Size   int64
	State  State
	Offset int64 // bytes transferred or present
	First  int64 // bytes that were present at the start
}

// Name returns the beginning of a line, such as "layer 0123456789ab".
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
	return fmt.Sprintf("%s %.12s", kind, d.Digest.Encoded())
}

// rateOver is the time over which the current rate is averaged.
const rateOver = 3 * time.Second

// A Display draws objects in place on a terminal. If the output is not a terminal, it does nothing.
type Display struct {
	screen screen
	meter  meter
}

// New returns a display that draws on out.
func New(out *os.File) *Display { return &Display{screen{out: out}, meter{begin: time.Now()}} }

// Draw draws the objects over the last frame. The final frame shows the average rate, and stays.
func (d *Display) Draw(objects []*Object, last bool) {
	if width, height, ok := d.screen.size(); ok && len(objects) > 0 {
		// The last column stays free, since some terminals wrap when it is written to.
		d.screen.draw(d.frame(objects, width-1, height-1, time.Now(), last))
	}
	if last {
		d.screen.end()
	}
}

// frame returns the lines for the objects, their sum and the rate, for a number of columns and rows. If there is not
// enough room, it shows the objects that are moving, and the number of the others.
func (d *Display) frame(objects []*Object, width, height int, now time.Time, last bool) []string {
	shown, hidden := objects, []*Object(nil)
	if room := max(height-2, 1); len(objects) > room {
		chosen := map[*Object]bool{}
		for _, want := range []func(State) bool{
			func(s State) bool { return s == Moving },
			func(s State) bool { return s == Waiting },
			func(s State) bool { return s >= Exists },
		} {
			for _, o := range objects {
				if want(o.State) && len(chosen) < room-1 {
					chosen[o] = true
				}
			}
		}
		shown = nil
		for _, o := range objects {
			if chosen[o] {
				shown = append(shown, o)
			} else {
				hidden = append(hidden, o)
			}
		}
	}
	sum := Object{Name: "total"}
	var brought int64
	names := len(sum.Name)
	for _, o := range objects {
		names = max(names, len(o.Name))
		sum.Offset += min(o.Offset, o.Size)
		sum.Size = max(sum.Size+o.Size, 0)
		brought += max(o.Offset-o.First, 0)
		if o.State < Exists {
			sum.State = Moving
		}
	}
	if sum.State != Moving {
		sum.State = Done
	}
	var lines []string
	for _, o := range shown {
		lines = append(lines, cut(o.line(names, width), width))
	}
	if len(hidden) > 0 {
		lines = append(lines, cut("and "+count(hidden), width))
	}
	d.meter.add(now, brought)
	left := ""
	if !last {
		left = d.meter.left(sum.Size - sum.Offset)
	}
	return append(lines, cut(sum.line(names, width), width),
		join(width, fmt.Sprintf("elapsed: %.1fs", now.Sub(d.meter.begin).Seconds()), d.meter.rate(now, last), left))
}

// widths of the columns of a line
const (
	stateWidth = 7
	sizeWidth  = len("1023 MiB")
	sizesWidth = 2*sizeWidth + 1
	minBar     = 12
)

// line returns the line of an object: its name, how far it is, a bar, and its size, as far as there is room.
func (o *Object) line(names, width int) string {
	state := o.State.String()
	size, sizes := humanize.IBytes(uint64(o.Size)), humanize.IBytes(uint64(o.Size))
	if o.State == Moving {
		size = humanize.IBytes(uint64(o.Offset))
		sizes = size + "/" + sizes
		if o.Size > 0 {
			state = fmt.Sprintf("%3d%%", int(100*o.share()))
		}
	}
	head := fmt.Sprintf("%-*s  %-*s", names, o.Name, stateWidth, state)
	switch room := width - len(head) - 2 - sizesWidth; {
	case room >= minBar+2:
		return head + "  " + o.bar(room-2) + "  " + sizes
	case room >= 0:
		return head + "  " + sizes
	case room+sizesWidth >= sizeWidth:
		return head + "  " + size
	}
	return head
}

// share returns the transferred part of an object, from 0 to 1.
func (o *Object) share() float64 {
	switch {
	case o.State >= Exists:
		return 1
	case o.Size <= 0:
		return 0
	}
	return min(float64(o.Offset)/float64(o.Size), 1)
}

func (o *Object) bar(width int) string {
	inner := width - 2
	full := int(o.share() * float64(inner))
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

// A meter measures a rate.
type meter struct {
	begin  time.Time
	points []point
}

// point is how many bytes had been transferred at a time.
type point struct {
	at    time.Time
	bytes int64
}

func (m *meter) add(now time.Time, bytes int64) {
	m.points = append(m.points, point{now, bytes})
	for len(m.points) > 2 && now.Sub(m.points[0].at) > rateOver {
		m.points = m.points[1:]
	}
}

// perSecond returns the rate of this run, over the last seconds or over all of it.
func (m *meter) perSecond(now time.Time, all bool) float64 {
	if len(m.points) == 0 {
		return 0
	}
	from, to := m.points[0], m.points[len(m.points)-1]
	if all {
		from = point{m.begin, 0}
	}
	span := now.Sub(from.at).Seconds()
	if span <= 0 {
		return 0
	}
	return max(float64(to.bytes-from.bytes), 0) / span
}

func (m *meter) rate(now time.Time, all bool) string {
	return humanize.IBytes(uint64(m.perSecond(now, all))) + "/s"
}

// longest is the longest time left that is shown.
const longest = 100 * time.Hour

// left returns how long the missing bytes take at the recent rate, or "" if that is not known.
func (m *meter) left(missing int64) string {
	if len(m.points) == 0 || missing <= 0 {
		return ""
	}
	seconds := float64(missing) / m.perSecond(m.points[len(m.points)-1].at, false)
	if seconds >= longest.Seconds() { // and if nothing comes
		return ""
	}
	return "left: " + (time.Duration(seconds) * time.Second).String()
}

// join joins the parts that fit, separated by spaces. The first part that does not fit is cut.
func join(width int, parts ...string) string {
	line := ""
	for _, p := range parts {
		switch {
		case line == "":
			line = cut(p, width)
		case p != "" && len(line)+2+len(p) <= width:
			line += "  " + p
		}
	}
	return line
}

func cut(s string, width int) string {
	if len(s) > width {
		return s[:max(width, 0)]
	}
	return s
}

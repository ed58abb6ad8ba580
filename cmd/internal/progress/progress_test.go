package progress

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func TestNames(t *testing.T) {
	d := ocispec.Descriptor{Digest: digest.FromString("")}
	for mediaType, want := range map[string]string{
		ocispec.MediaTypeImageIndex:                                 "index e3b0c44298fc",
		"application/vnd.docker.distribution.manifest.list.v2+json": "index e3b0c44298fc",
		ocispec.MediaTypeImageManifest:                              "manifest e3b0c44298fc",
		"application/vnd.docker.distribution.manifest.v2+json":      "manifest e3b0c44298fc",
		ocispec.MediaTypeImageConfig:                                "config e3b0c44298fc",
		"application/vnd.docker.container.image.v1+json":            "config e3b0c44298fc",
		ocispec.MediaTypeImageLayerZstd:                             "layer e3b0c44298fc",
		"application/vnd.docker.image.rootfs.diff.tar.gzip":         "layer e3b0c44298fc",
		"": "blob e3b0c44298fc",
	} {
		d.MediaType = mediaType
		if got := Name(d); got != want {
			t.Errorf("%s: %s, not %s", mediaType, got, want)
		}
	}
}

// objects are n objects, in every state.
func objects(n int) (all []*Object) {
	for i := range n {
		o := &Object{Name: fmt.Sprintf("layer %012d", i), Size: 1 << 40, State: State(i % 4), Offset: int64(i) << 32}
		if o.State >= Exists {
			o.Offset = o.Size
		}
		all = append(all, o)
	}
	all[0].Size, all[0].Offset = 0, 12 // a size that isn't known
	return all
}

func TestFramesFitTheTerminal(t *testing.T) {
	t.Parallel()
	for _, width := range []int{0, 1, 20, 40, 60, 79, 200} {
		for _, height := range []int{0, 1, 3, 4, 10, 24, 100, 300} {
			d := &Display{meter: meter{begin: time.Now().Add(-time.Minute)}}
			lines := d.frame(objects(200), width, height, time.Now(), height == 4)
			if len(lines) > max(height, 3) {
				t.Errorf("%d lines for a height of %d", len(lines), height)
			}
			for _, l := range lines {
				if len(l) > width {
					t.Errorf("%q is wider than %d", l, width)
				}
			}
			text := strings.Join(lines, "\n")
			if width >= 40 && (!strings.Contains(text, "total") || !strings.Contains(text, "elapsed")) {
				t.Errorf("%dx%d: no sum:\n%s", width, height, text)
			}
			if width >= 79 && height == 10 && (strings.Count(lines[0], "%") != 1 || !strings.Contains(text, "and 43 moving, 50 waiting, 50 done, 50 there already")) {
				t.Errorf("what moves is not shown first, or the rest not counted:\n%s", text)
			}
			if width == 200 && height == 300 && (len(lines) != 202 || len(lines[0]) < 180) {
				t.Errorf("%d lines, the first of %d columns", len(lines), len(lines[0]))
			}
		}
	}
}

func TestLines(t *testing.T) {
	t.Parallel()
	moving := Object{Name: "layer 0123456789ab", Size: 100 << 20, Offset: 25 << 20, State: Moving}
	for width, want := range map[int]string{
		79: "layer 0123456789ab   25%     [=======>                     ]  25 MiB/100 MiB",
		50: "layer 0123456789ab   25%     25 MiB/100 MiB",
		39: "layer 0123456789ab   25%     25 MiB",
		29: "layer 0123456789ab   25%   ",
	} {
		if got := moving.line(len(moving.Name), width); got != want || len(got) > width {
			t.Errorf("%d columns: %q, not %q", width, got, want)
		}
	}
	for o, want := range map[Object]string{
		{Name: "config", Size: 5, State: Waiting}:                          "config  waiting  5 B",
		{Name: "config", Size: 5, State: Done}:                             "config  done     5 B",
		{Name: "config", State: Moving, Offset: 5}:                         "config  moving   5 B/0 B",
		{Name: "config", Size: math.MaxInt64, State: Moving, Offset: 1}:    "config    0%     1 B/8.0 EiB",
		{Name: "config", Size: 1, State: Moving, Offset: math.MaxInt64}:    "config  100%     8.0 EiB/1 B",
		{Name: "config", Size: math.MaxInt64, State: Exists, Offset: 1000}: "config  exists   8.0 EiB",
	} {
		if got := o.line(6, 34); got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
}

func TestRateIsOfThisRun(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	d := &Display{meter: meter{begin: begin}}
	o := &Object{Name: "x", Size: 100 << 20, First: 50 << 20, Offset: 50 << 20, State: Moving}
	sum := func(after time.Duration, last bool) string {
		lines := d.frame([]*Object{o}, 79, 24, begin.Add(after), last)
		return strings.Join(lines[1:], "\n")
	}
	sum(0, false)
	o.Offset = 60 << 20
	if got := sum(time.Second, false); !strings.Contains(got, " 60%") || !strings.Contains(got, "60 MiB/100 MiB") || !strings.Contains(got, "elapsed: 1.0s  10 MiB/s  left: 4s") {
		t.Error(got)
	}
	if got := sum(100*time.Second, false); !strings.HasSuffix(got, "0 B/s") && !strings.Contains(got, "103 KiB/s") {
		t.Error(got)
	}
	o.Offset, o.State = 100<<20, Done
	if got := sum(100*time.Second, true); !strings.Contains(got, "done") || !strings.HasSuffix(got, "elapsed: 100.0s  512 KiB/s") {
		t.Error(got)
	}
}

func TestStepLine(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	s := &Step{what: "layers"}
	s.Total(100<<20, 7)
	m := meter{begin: begin}
	m.add(begin, 0)
	s.Add(50 << 20)
	s.Count()
	s.Count()
	m.add(begin.Add(2*time.Second), 50<<20)
	line := func(width int) string {
		_, text, _ := strings.Cut(s.line(&m, width, begin.Add(2*time.Second)), ":")
		return text
	}
	if got := line(200); got != " 50%  2 of 7 layers  50 MiB of 100 MiB  left: 2s  25 MiB/s  elapsed: 2s" {
		t.Errorf("%q", got)
	}
	for width := range 100 {
		if got := s.line(&m, width, begin); len(got) > width {
			t.Errorf("%d columns: %q", width, got)
		}
	}
	s = &Step{what: "blobs"}
	s.Count()
	if got := line(200); got != " 1 blobs  elapsed: 2s" {
		t.Errorf("%q", got)
	}
	s.stop = make(chan struct{})
	s.End()
	s.End()
	var none *Step // where there is no terminal
	none.Add(1)
	none.Count()
	none.Total(1, 1)
	none.End()
	if r := strings.NewReader(""); none.Reader(r) != io.Reader(r) {
		t.Error("a reader is wrapped for nothing")
	}
}

// A model of a terminal: its rows, the last of which has the cursor.
type model struct {
	width int
	wraps bool // whether it wraps rows again when it becomes narrower
	rows  []row
	at    int
}

type row struct {
	text string
	more bool // the next row belongs to it
}

func (m *model) write(s string) {
	for s != "" {
		if rest, ok := strings.CutPrefix(s, "\x1b["); ok {
			n, i := 0, 0
			for ; rest[i] >= '0' && rest[i] <= '9'; i++ {
				n = 10*n + int(rest[i]-'0')
			}
			switch rest[i] {
			case 'A':
				m.at = max(m.at-n, 0)
			case 'K': // what is written begins every row, and is shorter than it
			case 'J':
				m.rows = append(m.rows[:m.at], row{})
			}
			s = rest[i+1:]
			continue
		}
		end := strings.IndexAny(s, "\x1b\r\n")
		switch {
		case end < 0:
			end = len(s)
			fallthrough
		case end > 0:
			m.rows[m.at] = row{text: s[:end]}
			s = s[end:]
			continue
		case s[0] == '\n':
			if m.at++; m.at == len(m.rows) {
				m.rows = append(m.rows, row{})
			}
		}
		s = s[1:]
	}
}

func (m *model) resize(width int) {
	var rows []row
	text := ""
	for _, r := range m.rows {
		if text += r.text; r.more {
			continue
		}
		for m.wraps && len(text) > width {
			rows = append(rows, row{text[:width], true})
			text = text[width:]
		}
		rows = append(rows, row{text: text[:min(len(text), width)]})
		text = ""
	}
	m.rows, m.at, m.width = rows, len(rows)-1, width
}

// Nothing of an earlier frame is left, and nothing that was there before is lost, when a window is made narrower and wider.
func TestResize(t *testing.T) {
	for _, wraps := range []bool{true, false} {
		t.Run(fmt.Sprint("wraps=", wraps), func(t *testing.T) {
			t.Setenv("TERM", map[bool]string{true: "tmux-256color", false: "linux"}[wraps])
			t.Setenv("XTERM_VERSION", "")
			t.Setenv("STY", "")
			pty, slave, err := console.NewPty()
			if err != nil {
				t.Fatal(err)
			}
			defer pty.Close()
			tty, err := os.OpenFile(slave, os.O_RDWR|unix.O_NOCTTY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer tty.Close()
			raw, err := console.ConsoleFromFile(tty)
			if err == nil {
				err = raw.SetRaw()
			}
			if err != nil {
				t.Fatal(err)
			}
			m := &model{width: 200, wraps: wraps, rows: []row{{text: "$ dist-pull x"}, {}}, at: 1}
			d := New(tty)
			for i, width := range []uint16{200, 80, 40, 79, 60, 200, 41, 100} {
				m.resize(int(width))
				if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: width}); err != nil {
					t.Fatal(err)
				}
				d.Draw(objects(12), i == 7)
				if _, err := tty.WriteString("\a"); err != nil {
					t.Fatal(err)
				}
				var b []byte
				for !bytes.HasSuffix(b, []byte("\a")) {
					part := make([]byte, 64<<10)
					n, err := pty.Read(part)
					if err != nil {
						t.Fatal(err)
					}
					b = append(b, part[:n]...)
				}
				m.write(strings.TrimSuffix(string(b), "\a"))
				// The command line, 12 objects, the sum, the rate, and the cursor's row.
				if len(m.rows) != 16 || m.rows[0].text != "$ dist-pull x" || !strings.Contains(m.rows[1].text, "layer 000000000000") || !strings.Contains(m.rows[14].text, "elapsed") {
					t.Fatalf("%d columns:\n%+v", width, m.rows)
				}
			}
		})
	}
}

// Of two that draw on a terminal the first goes on until it is done. A message takes its rows away.
func TestOneDrawsAtATime(t *testing.T) {
	t.Setenv("TERM", "xterm")
	pty, slave, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	var displays []*Display
	for range 2 {
		tty, err := os.OpenFile(slave, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer tty.Close()
		displays = append(displays, New(tty))
	}
	one, two := displays[0], displays[1]
	drawn := func(d *Display) bool { return len(d.screen.rows) > 0 }
	one.Draw(objects(3), false)
	two.Draw(objects(3), false)
	if !drawn(one) || drawn(two) {
		t.Errorf("drawn: %v, %v", drawn(one), drawn(two))
	}
	written := false
	Erase(func() {
		if written = true; drawn(one) {
			t.Error("the rows are still there when the message is written")
		}
		if one.screen.mu.TryLock() {
			one.screen.mu.Unlock()
			t.Error("rows can be drawn while the message is written")
		}
	})
	if !written {
		t.Error("the message is not written")
	}
	one.Draw(objects(3), true)
	two.Draw(objects(3), false)
	if !drawn(two) {
		t.Error("the second does not draw after the first")
	}
	two.Draw(objects(3), true)
	t.Setenv("TERM", "dumb")
	one.Draw(objects(3), false)
	if drawn(one) {
		t.Error("drawn on a terminal that can't move its cursor")
	}
}

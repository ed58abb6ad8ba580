package cli

import (
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
)

// A cell is a cell of a table: a text that a terminal shows as it is, its colour, and whether it is wrapped instead of cut.
type cell struct {
	text   string
	colour Colour
	wraps  bool
}

const (
	columnGap = 2
	// shortDigest is how many hexadecimal digits are left of a digest. It is docker's number.
	shortDigest = 12
)

// leastWidths are the widths that columns are cut to, one after the other, as long as the table is too wide.
var leastWidths = []int{5, 3, 1}

// A cell that is a digest is shortened to its first digits, as docker does. In a longer text, and of another algorithm than sha256, the
// algorithm stays.
var (
	wholeDigest = regexp.MustCompile(`^sha256:([0-9a-f]{` + strconv.Itoa(shortDigest) + `})[0-9a-f]{20,}$`)
	anyDigest   = regexp.MustCompile(`\b([a-z0-9]+:[0-9a-f]{` + strconv.Itoa(shortDigest) + `})[0-9a-f]{20,}`)
)

// align returns rows as a table that fits a width, unless that is 0 or too small for the columns. The first column is the last to be cut.
func align(rows [][]cell, width int) string {
	widths := measure(rows)
	if over(widths, width) > 0 {
		for _, row := range rows[1:] {
			for i := range row {
				row[i].text = anyDigest.ReplaceAllString(wholeDigest.ReplaceAllString(row[i].text, "$1"), "$1")
			}
		}
		widths = measure(rows)
	}
	for _, least := range leastWidths {
		narrow(widths, over(widths, width), least)
	}
	paint := HasColour(os.Stdout)
	var b strings.Builder
	for _, row := range rows {
		for more := true; more; {
			more = false
			space := 0
			for i := range row {
				c, text := &row[i], ""
				if text, c.text = c.line(widths[i]); c.text != "" {
					more = true
				}
				if text != "" {
					b.WriteString(strings.Repeat(" ", space))
					space = 0
				}
				space += widths[i] - Columns(text) + columnGap
				if paint {
					text = c.colour.Paint(text)
				}
				b.WriteString(text)
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// line returns what a line of a column of a width shows of a cell, and what is left for further lines. Words are kept whole if they fit.
func (c cell) line(width int) (line, rest string) {
	if !c.wraps || Columns(c.text) <= width {
		return Cut(c.text, width), ""
	}
	end, n := 0, 0
	for i, r := range c.text {
		if r == ' ' {
			end = i
		}
		if n += columns(r); n > width {
			if end == 0 {
				end = i
			}
			break
		}
	}
	if end == 0 { // not even the first character fits
		return Cut(c.text, width), ""
	}
	return c.text[:end], strings.TrimLeft(c.text[end:], " ")
}

// narrow takes n columns from those that are wider than least, if it can: from the widest, and from the first only when the others are narrow.
func narrow(widths []int, n, least int) {
	for ; n > 0; n-- {
		widest := 0
		for i := range widths {
			if i > 0 && widths[i] > least && (widest == 0 || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widths[widest] <= least {
			return
		}
		widths[widest]--
	}
}

// measure returns the width of each column.
func measure(rows [][]cell) (widths []int) {
	for _, row := range rows {
		for i, c := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], Columns(c.text))
		}
	}
	return widths
}

// over returns by how much a table of such columns is wider than a width. Width 0 is not known.
func over(widths []int, width int) int {
	if width == 0 {
		return 0
	}
	n := (len(widths) - 1) * columnGap
	for _, w := range widths {
		n += w
	}
	return n - width
}

// Cut shortens a printable text to a width in columns, and marks that with "…": in the middle of a name, path or digest, whose end tells as much
// as its beginning, and at the end of a text of several words.
func Cut(text string, width int) string {
	if Columns(text) <= width {
		return text
	}
	runes := []rune(text)
	tail := 0
	if !strings.Contains(text, " ") {
		tail = (width - 1) / 2
	}
	from := len(runes)
	for n := 0; from > 0; from-- {
		if n += columns(runes[from-1]); n > tail {
			break
		}
	}
	to := 0
	for n := 1 + Columns(string(runes[from:])); to < from; to++ {
		if n += columns(runes[to]); n > width {
			break
		}
	}
	return string(slices.Concat(runes[:to], []rune{'…'}, runes[from:]))
}

// Fit returns a line for a terminal of a width: printable, with shorter digests if it is too wide, and then cut. A width of 0 is not known.
func Fit(line string, width int) string {
	line = Printable(line)
	if width == 0 || Columns(line) <= width {
		return line
	}
	return Cut(anyDigest.ReplaceAllString(line, "$1"), width)
}

// Columns returns how many columns of a terminal a printable text takes.
func Columns(s string) int {
	n := 0
	for _, r := range s {
		n += columns(r)
	}
	return n
}

func columns(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.Is(combining, r):
		return 0
	case unicode.Is(wide, r):
		return 2
	}
	return 1
}

// combining are the blocks of marks that are drawn over the character before them. Other such marks are counted as a column: a table is never
// wider than its terminal by them.
var combining = &unicode.RangeTable{
	R16: []unicode.Range16{
		{0x0300, 0x036f, 1}, {0x1ab0, 0x1aff, 1}, {0x1dc0, 0x1dff, 1}, {0x20d0, 0x20ff, 1}, {0x3099, 0x309a, 1}, {0xfe00, 0xfe0f, 1}, {0xfe20, 0xfe2f, 1},
	},
}

// wide are the characters that take two columns: those of Unicode's East_Asian_Width W and F (golang.org/x/text/width).
var wide = &unicode.RangeTable{
	R16: []unicode.Range16{
		{0x1100, 0x115f, 1}, {0x231a, 0x231b, 1}, {0x2329, 0x232a, 1}, {0x23e9, 0x23ec, 1}, {0x23f0, 0x23f0, 1}, {0x23f3, 0x23f3, 1},
		{0x25fd, 0x25fe, 1}, {0x2614, 0x2615, 1}, {0x2648, 0x2653, 1}, {0x267f, 0x267f, 1}, {0x2693, 0x2693, 1}, {0x26a1, 0x26a1, 1},
		{0x26aa, 0x26ab, 1}, {0x26bd, 0x26be, 1}, {0x26c4, 0x26c5, 1}, {0x26ce, 0x26ce, 1}, {0x26d4, 0x26d4, 1}, {0x26ea, 0x26ea, 1},
		{0x26f2, 0x26f3, 1}, {0x26f5, 0x26f5, 1}, {0x26fa, 0x26fa, 1}, {0x26fd, 0x26fd, 1}, {0x2705, 0x2705, 1}, {0x270a, 0x270b, 1},
		{0x2728, 0x2728, 1}, {0x274c, 0x274c, 1}, {0x274e, 0x274e, 1}, {0x2753, 0x2755, 1}, {0x2757, 0x2757, 1}, {0x2795, 0x2797, 1},
		{0x27b0, 0x27b0, 1}, {0x27bf, 0x27bf, 1}, {0x2b1b, 0x2b1c, 1}, {0x2b50, 0x2b50, 1}, {0x2b55, 0x2b55, 1}, {0x2e80, 0x303e, 1},
		{0x3041, 0x3247, 1}, {0x3250, 0x4dbf, 1}, {0x4e00, 0xa4c6, 1}, {0xa960, 0xa97c, 1}, {0xac00, 0xd7a3, 1}, {0xf900, 0xfaff, 1},
		{0xfe10, 0xfe19, 1}, {0xfe30, 0xfe6b, 1}, {0xff01, 0xff60, 1}, {0xffe0, 0xffe6, 1},
	},
	R32: []unicode.Range32{
		{0x16fe0, 0x1b2fb, 1}, {0x1f004, 0x1f004, 1}, {0x1f0cf, 0x1f0cf, 1}, {0x1f18e, 0x1f18e, 1}, {0x1f191, 0x1f19a, 1},
		{0x1f200, 0x1f320, 1}, {0x1f32d, 0x1f335, 1}, {0x1f337, 0x1f37c, 1}, {0x1f37e, 0x1f393, 1}, {0x1f3a0, 0x1f3ca, 1},
		{0x1f3cf, 0x1f3d3, 1}, {0x1f3e0, 0x1f3f0, 1}, {0x1f3f4, 0x1f3f4, 1}, {0x1f3f8, 0x1f43e, 1}, {0x1f440, 0x1f440, 1},
		{0x1f442, 0x1f4fc, 1}, {0x1f4ff, 0x1f53d, 1}, {0x1f54b, 0x1f54e, 1}, {0x1f550, 0x1f567, 1}, {0x1f57a, 0x1f57a, 1},
		{0x1f595, 0x1f596, 1}, {0x1f5a4, 0x1f5a4, 1}, {0x1f5fb, 0x1f64f, 1}, {0x1f680, 0x1f6c5, 1}, {0x1f6cc, 0x1f6cc, 1},
		{0x1f6d0, 0x1f6d2, 1}, {0x1f6d5, 0x1f6df, 1}, {0x1f6eb, 0x1f6ec, 1}, {0x1f6f4, 0x1f6fc, 1}, {0x1f7e0, 0x1f7f0, 1},
		{0x1f90c, 0x1f93a, 1}, {0x1f93c, 0x1f945, 1}, {0x1f947, 0x1f9ff, 1}, {0x1fa70, 0x1faf8, 1}, {0x20000, 0x3fffd, 1},
	},
}

// cell returns a cell of the table.
func (r *Records) cell(v any) cell {
	switch v := v.(type) {
	case MediaType:
		if word, ok := mediaWords[string(v)]; ok && !*r.full {
			return cell{text: word}
		}
		return cell{text: human(string(v))}
	case State:
		return cell{text: human(string(v)), colour: stateColours[string(v)]}
	case Text:
		return cell{text: human(string(v)), wraps: true}
	}
	return cell{text: human(v)}
}

// mediaWords are what a table calls the media types of images.
var mediaWords = map[string]string{
	"application/vnd.oci.image.index.v1+json":                      "oci index",
	"application/vnd.oci.image.manifest.v1+json":                   "oci",
	"application/vnd.oci.image.config.v1+json":                     "oci config",
	"application/vnd.oci.image.layer.v1.tar":                       "oci tar",
	"application/vnd.oci.image.layer.v1.tar+gzip":                  "oci gzip",
	"application/vnd.oci.image.layer.v1.tar+zstd":                  "oci zstd",
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      "oci foreign tar",
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "oci foreign gzip",
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "oci foreign zstd",
	"application/vnd.oci.empty.v1+json":                            "oci empty",
	"application/vnd.docker.distribution.manifest.list.v2+json":    "docker index",
	"application/vnd.docker.distribution.manifest.v2+json":         "docker",
	"application/vnd.docker.container.image.v1+json":               "docker config",
	"application/vnd.docker.image.rootfs.diff.tar":                 "docker tar",
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            "docker gzip",
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            "docker zstd",
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         "docker foreign tar",
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    "docker foreign gzip",
}

// A Colour is a terminal's number of a foreground colour, 0 for the usual one.
type Colour int

// The colours that mean something.
const (
	Red    Colour = 31
	Green  Colour = 32
	Yellow Colour = 33
	Blue   Colour = 34
	Cyan   Colour = 36
)

// Paint returns a text in the colour, for a file of which [HasColour] is true.
func (c Colour) Paint(s string) string {
	if c == 0 || s == "" {
		return s
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", c, s)
}

// HasColour tells whether a file is a terminal that is to show colours: NO_COLOR is not set, and TERM is not dumb.
func HasColour(f *os.File) bool {
	_, ok := IsTerminal(f)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// stateColours are the colours of the words of a State.
var stateColours = map[string]Colour{
	"running": Green, "healthy": Green, "default": Green, "ok": Green, "active": Green,
	"paused": Yellow, "limited": Yellow, "stale": Yellow,
	"missing": Red, "corrupt": Red, "unusable": Red, "unhealthy": Red, "unknown": Red, "broken": Red,
}

// ages are how long ago something was, in as few characters as possible.
var ages = []humanize.RelTimeMagnitude{
	{D: time.Second, Format: "now", DivBy: time.Second},
	{D: time.Minute, Format: "%ds %s", DivBy: time.Second},
	{D: time.Hour, Format: "%dm %s", DivBy: time.Minute},
	{D: humanize.Day, Format: "%dh %s", DivBy: time.Hour},
	{D: humanize.Month, Format: "%dd %s", DivBy: humanize.Day},
	{D: humanize.Year, Format: "%dmo %s", DivBy: humanize.Month},
	{D: math.MaxInt64, Format: "%dy %s", DivBy: humanize.Year},
}

// human returns a cell's text on a terminal.
func human(c any) string {
	switch v := c.(type) {
	case Name:
		if strings.ContainsFunc(string(v), func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
			return strconv.Quote(string(v))
		}
		return human(string(v))
	case Size:
		if v < 0 {
			return "-" // not known
		}
		return humanize.IBytes(uint64(v))
	case Limit:
		if v <= 0 {
			return "-"
		}
		return human(Size(v))
	case time.Duration:
		if v < time.Second {
			return v.Round(100 * time.Microsecond).String()
		}
		return v.Round(10 * time.Millisecond).String()
	case time.Time:
		if v.IsZero() {
			return "-"
		}
		return humanize.CustomRelTime(v, time.Now(), "ago", "from now", ages)
	}
	s := Printable(fmt.Sprint(c))
	if s == "" {
		return "-"
	}
	return s
}

// Printable returns a text for a terminal: what can't be shown is a question mark.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}

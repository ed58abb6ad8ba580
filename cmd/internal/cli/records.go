package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

// Size is a cell that holds bytes: a plain number in a pipe, "1.2 MiB" on a terminal.
type Size int64

// Limit is a Size that 0 does not bound: "-" on a terminal.
type Limit int64

// Name is a cell that holds a path or another name that a stranger chose. On a terminal it is quoted, as in Go, if it has characters
// that can't be shown.
type Name string

// Records prints one record a line: tab-separated with raw numbers and RFC 3339 times in a
// pipe, an aligned table with a header on a terminal, one JSON object a line with --json,
// the first cell alone with -q, records ended by NUL with -z.
//
// A table fits the terminal's width unless --full is given: digests are shortened if it would not, and then the widest columns.
//
// In a pipe a backslash, a tab and a newline of a cell are written as \\, \t and \n, which printf %b turns back. The first
// cell alone is written as it is, so that it can be read by another command, but for a newline; with -z that too.
type Records struct {
	cmd                   *cobra.Command
	columns               []string
	full, json, key, zero *bool
	table                 [][]string // the header and the records that have not been printed
}

// NewRecords registers --full, --json, -q and -z. The first column is the record's key.
func NewRecords(c *cobra.Command, columns ...string) *Records {
	f := c.Flags()
	return &Records{
		cmd: c, columns: columns,
		full: f.Bool("full", false, "shorten nothing to fit a terminal's width"),
		json: f.Bool("json", false, "print one JSON object a line"),
		key:  f.BoolP("quiet", "q", false, "print the "+strings.ToLower(columns[0])+" alone"),
		zero: f.BoolP("zero", "z", false, "end records with NUL instead of newline"),
	}
}

// Columns sets other columns, for a command that prints several kinds of records.
func (r *Records) Columns(columns ...string) { r.columns = columns }

// Quiet tells whether the key alone is asked for, so that nothing else need be looked up.
func (r *Records) Quiet() bool { return *r.key && !*r.json }

// Table tells whether records are a table for a person to look at.
func (r *Records) Table() bool {
	_, tty := IsTerminal(os.Stdout)
	return tty && !*r.json && !*r.key && !*r.zero
}

// Write prints a record: value is what --json shows, cells are the columns (string, Name, Size,
// Limit, integers, time.Time, time.Duration: nanoseconds in a pipe), the key first.
func (r *Records) Write(value any, cells ...any) error {
	out, end := r.cmd.OutOrStdout(), r.end()
	switch {
	case *r.json:
		b, err := json.Marshal(value)
		if err != nil {
			return fmt.Errorf("encode record: %w", err)
		}
		_, err = fmt.Fprintf(out, "%s%s", b, end)
		return err
	case *r.key:
		key := plain(cells[0])
		if !*r.zero {
			key = strings.ReplaceAll(key, "\n", `\n`)
		}
		_, err := io.WriteString(out, key)
		if err == nil {
			_, err = io.WriteString(out, end)
		}
		return err
	}
	if r.Table() {
		if r.table == nil {
			r.table = [][]string{r.columns}
		}
		row := make([]string, len(cells))
		for i, c := range cells {
			row[i] = human(c)
		}
		r.table = append(r.table, row)
		return nil
	}
	return join(out, cells, end)
}

// WriteKey prints a key alone, as it is: for paths, which a shell is to use. With -z it may hold newlines.
func (r *Records) WriteKey(key string) error {
	_, err := io.WriteString(r.cmd.OutOrStdout(), key+r.end())
	return err
}

// end returns what ends a record.
func (r *Records) end() string {
	if *r.zero {
		return "\x00"
	}
	return "\n"
}

// Close prints the table; what is written then begins another.
func (r *Records) Close() error {
	if r.table == nil {
		return nil
	}
	width, _ := IsTerminal(os.Stdout)
	if *r.full {
		width = 0
	}
	text := align(r.table, width)
	r.table = nil
	_, err := io.WriteString(r.cmd.OutOrStdout(), text)
	return err
}

const (
	columnGap = 2
	// minColumn is the width below which a column is not cut.
	minColumn = 6
	// shortDigest is how many hexadecimal digits are left of a digest. It is docker's number.
	shortDigest = 12
)

// align returns rows as a table that fits a width, unless that is 0 or too small for the columns.
func align(rows [][]string, width int) string {
	widths := measure(rows)
	if over(widths, width) > 0 {
		digests := regexp.MustCompile(`\b([a-z0-9]+:[0-9a-f]{` + strconv.Itoa(shortDigest) + `})[0-9a-f]{20,}`)
		for _, row := range rows[1:] {
			for i := range row {
				row[i] = digests.ReplaceAllString(row[i], "$1")
			}
		}
		widths = measure(rows)
	}
	for n := over(widths, width); n > 0; n-- {
		widest := 0
		for i := range widths {
			if widths[i] > widths[widest] {
				widest = i
			}
		}
		if widths[widest] <= minColumn {
			break
		}
		widths[widest]--
	}
	var b strings.Builder
	for _, row := range rows {
		for i, cell := range row {
			cell = cut(cell, widths[i])
			b.WriteString(cell)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+columnGap))
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// measure returns the width of each column.
func measure(rows [][]string) (widths []int) {
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
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

// cut takes characters out of the middle of a cell that is too wide: the end of a name, path or media type tells as much as its
// beginning.
func cut(cell string, width int) string {
	runes := []rune(cell)
	if len(runes) <= width {
		return cell
	}
	tail := (width - 1) / 2
	return string(slices.Concat(runes[:width-1-tail], []rune{'…'}, runes[len(runes)-tail:]))
}

func join(w io.Writer, cells []any, end string) error {
	var b strings.Builder
	for i, c := range cells {
		if i > 0 {
			b.WriteByte('\t')
		}
		b.WriteString(raw(c))
	}
	b.WriteString(end)
	_, err := w.Write([]byte(b.String()))
	return err
}

// raw is a cell of a record in a pipe.
func raw(c any) string { return recordEscape.Replace(plain(c)) }

// recordEscape keeps a cell from ending its record, or being taken for another one.
var recordEscape = strings.NewReplacer(`\`, `\\`, "\t", `\t`, "\n", `\n`, "\x00", `\0`)

// plain is a cell as text for programs.
func plain(c any) string {
	switch v := c.(type) {
	case string:
		return v
	case Name:
		return string(v)
	case Size:
		return strconv.FormatInt(int64(v), 10)
	case Limit:
		return strconv.FormatInt(int64(v), 10)
	case time.Duration:
		return strconv.FormatInt(v.Nanoseconds(), 10)
	case time.Time:
		if v.IsZero() {
			return ""
		}
		return v.UTC().Format(time.RFC3339Nano)
	}
	return fmt.Sprint(c)
}

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
		return humanize.Time(v)
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

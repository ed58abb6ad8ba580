package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// Size is a cell that holds bytes: a plain number in a pipe, "1.2 MiB" on a terminal.
type Size int64

// Limit is a Size that 0 does not bound: "-" on a terminal.
type Limit int64

// Name is a cell that holds a path or another name that a stranger chose. On a terminal it is quoted, as in Go, if it has characters
// that can't be shown.
type Name string

// MediaType is a cell that holds a media type: a short word such as "docker" or "oci gzip" on a terminal, unless --full is given.
type MediaType string

// State is a cell that holds a word for how something is. On a terminal "running" and the like are green, "paused" is yellow, and "missing"
// is red.
type State string

// Text is a cell that holds a sentence. A table wraps it, where other cells are cut.
type Text string

// Records prints one record a line: tab-separated with raw numbers and RFC 3339 times in a
// pipe, an aligned table with a header on a terminal, one JSON object a line with --json,
// the first cell alone with -q, records ended by NUL with -z.
//
// A table fits the terminal's width unless --full is given: digests are shortened if it would not, and then cells, those of the first
// column last. With --human records are a table in a pipe too, of $COLUMNS columns, for watch(1).
//
// In a pipe a backslash, a tab and a newline of a cell are written as \\, \t and \n, which printf %b turns back. The first
// cell alone is written as it is, so that it can be read by another command, but for a newline; with -z that too.
type Records struct {
	cmd                          *cobra.Command
	columns                      []string
	full, human, json, key, zero *bool
	table                        [][]cell // the header and the records that have not been printed
	written                      bool     // records have been written
}

// NewRecords registers --full, --human, --json, -q and -z. The first column is the record's key.
func NewRecords(c *cobra.Command, columns ...string) *Records {
	f := c.Flags()
	return &Records{
		cmd: c, columns: columns,
		full:  f.Bool("full", false, "shorten nothing to fit a terminal's width"),
		human: f.Bool("human", false, "print the table that a terminal gets, also into a pipe"),
		json:  f.Bool("json", false, "print one JSON object a line"),
		key:   f.BoolP("quiet", "q", false, "print the "+strings.ToLower(columns[0])+" alone"),
		zero:  f.BoolP("zero", "z", false, "end records with NUL instead of newline"),
	}
}

// Columns sets other columns, for a command that prints several kinds of records.
func (r *Records) Columns(columns ...string) { r.columns = columns }

// Quiet tells whether the key alone is asked for, so that nothing else need be looked up.
func (r *Records) Quiet() bool { return *r.key && !*r.json }

// Table tells whether records are a table for a person to look at.
func (r *Records) Table() bool {
	_, tty := IsTerminal(os.Stdout)
	return (tty || *r.human) && !*r.json && !*r.key && !*r.zero
}

// Width returns the columns that a table may take: the terminal's, or with --human $COLUMNS where there is no terminal. It is 0 if they
// are not known, and with --full.
func (r *Records) Width() int {
	if *r.full {
		return 0
	}
	width, tty := IsTerminal(os.Stdout)
	if !tty {
		width, _ = strconv.Atoi(os.Getenv("COLUMNS"))
	}
	return max(width, 0)
}

// Write prints a record: value is what --json shows, cells are the columns (string, Name, Size, Limit, MediaType, State,
// integers, time.Time, time.Duration: nanoseconds in a pipe), the key first.
func (r *Records) Write(value any, cells ...any) error {
	out, end := r.cmd.OutOrStdout(), r.end()
	r.written = true
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
			r.table = [][]cell{make([]cell, len(r.columns))}
			for i, name := range r.columns {
				r.table[0][i].text = name
			}
		}
		row := make([]cell, len(cells))
		for i, c := range cells {
			row[i] = r.cell(c)
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

// Close prints the table; what is written then begins another. If there was no record because there is no store, a person at a terminal
// is told.
func (r *Records) Close() error {
	if r.table == nil {
		if r.Table() && !r.written {
			TellNoStore(r.cmd)
		}
		return nil
	}
	text := align(r.table, r.Width())
	r.table = nil
	_, err := io.WriteString(r.cmd.OutOrStdout(), text)
	return err
}

// TellNoStore says on standard error that a listing for a person is empty because the directory of --root does not exist.
func TellNoStore(c *cobra.Command) {
	f := c.Flags().Lookup("root")
	if f == nil {
		return
	}
	root := f.Value.String()
	if _, err := os.Stat(root); !errors.Is(err, fs.ErrNotExist) {
		return
	}
	if abs, err := filepath.Abs(root); err == nil {
		root = abs
	}
	Report(c, fmt.Errorf("no store at %s (--root or DIST_ROOT name one)", root))
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
	case MediaType:
		return string(v)
	case State:
		return string(v)
	case Text:
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

package stdio

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"distkit/disk"
)

// defaultLimit is the size at which a log is rotated by default.
const defaultLimit = 16 << 20

// pieceRoom is how many bytes of a line are written at once.
const pieceRoom = 16 << 10

// Streams of log lines besides stdout and stderr. Readers skip lines of streams that they don't know.
const (
	offsetStream = "offset" // first line of a file: how many bytes of the log precede the file
	lostStream   = "lost"   // how many bytes could not be written here
	beginStream  = "begin"  // a run begins here
)

// Dir is the directory of a log.
type Dir struct {
	Tree disk.Tree
	Name string
}

func (d Dir) current() string { return filepath.Join(d.Name, "log") }

// Writer writes a process's output to its log in Kubernetes' format: each line has a time, the stream, F (full) or P
// (partial: the line continues), and the bytes. When the file reaches the limit, it is renamed to log.1 and replaces
// the previous one. So both together take at most twice the limit.
type Writer struct {
	dir   Dir
	limit int64

	mu     sync.Mutex
	file   *os.File
	size   int64
	offset int64 // the file's offset in the whole log
	lost   int64 // bytes that could not be written after the last line that was
	buf    []byte
}

// NewWriter returns a writer for the log in a directory. It creates the log at once, so that it can be followed. It
// appends to the log of an earlier process. A limit of 0 means 16 MiB.
func NewWriter(d Dir, limit int64) (*Writer, error) {
	if limit <= 0 {
		limit = defaultLimit
	}
	l := &Writer{dir: d, limit: limit}
	return l, l.open()
}

// Write appends output of a stream. It returns no error, because a full disk must not stop the process. Bytes that
// can't be written are counted, and the count is written to the log once there is room.
func (l *Writer) Write(stream string, p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UTC()
	for len(p) > 0 {
		l.buf = l.buf[:0]
		for len(p) > 0 && len(l.buf) < pieceRoom {
			line, tag := p, byte('P')
			if i := bytes.IndexByte(p, '\n'); i >= 0 {
				line, tag = p[:i], 'F'
			}
			if len(line) > pieceRoom {
				line, tag = line[:pieceRoom], 'P'
			}
			p = p[len(line):]
			if tag == 'F' {
				p = p[1:]
			}
			l.buf = appendLine(l.buf, now, stream, tag, line)
		}
		l.flush(now)
	}
}

func appendLine(b []byte, now time.Time, stream string, tag byte, text []byte) []byte {
	b = now.AppendFormat(b, time.RFC3339Nano)
	b = append(append(append(b, ' '), stream...), ' ', tag, ' ')
	return append(append(b, text...), '\n')
}

// flush writes the buffer. It rotates the log first if the file has no room for the buffer.
func (l *Writer) flush(now time.Time) {
	if l.file != nil && l.size > 0 && l.size+int64(len(l.buf)) > l.limit {
		_ = l.file.Close()
		l.file = nil
		if l.dir.Tree.Rename(l.dir.current(), l.dir.current()+".1") == nil {
			l.offset += l.size
		}
	}
	if l.file == nil && l.open() != nil {
		l.lost += int64(len(l.buf))
		return
	}
	if l.lost > 0 {
		line := appendLine(nil, now, lostStream, 'F', strconv.AppendInt(nil, l.lost, 10))
		if l.append(line) != nil {
			l.lost += int64(len(l.buf))
			return
		}
		l.lost = 0
	}
	if l.append(l.buf) != nil {
		l.lost += int64(len(l.buf))
	}
}

// append writes lines to the file, all or none of them.
func (l *Writer) append(b []byte) error {
	n, err := l.file.Write(b)
	if err != nil && n > 0 {
		_ = l.file.Truncate(l.size)
		n = 0
	}
	l.size += int64(n)
	return err
}

// open opens the current file. If a killed writer has left an incomplete last line, it ends that line.
func (l *Writer) open() error {
	f, err := l.dir.Tree.OpenFile(l.dir.current(), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if l.size, err = f.Seek(0, io.SeekEnd); err != nil {
		_ = f.Close()
		return err
	}
	l.file = f
	if l.size == 0 {
		return l.append(appendLine(nil, time.Now().UTC(), offsetStream, 'F', strconv.AppendInt(nil, l.offset, 10)))
	}
	l.offset = max(0, offsetOf(beginning(f)))
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
		return l.append([]byte{'\n'})
	}
	return nil
}

// Begin marks the beginning of a run. Readers skip the mark.
func (l *Writer) Begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.append(appendLine(nil, time.Now().UTC(), beginStream, 'F', nil))
	}
}

// Close closes the file.
func (l *Writer) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
}

// Entry is a piece of a process's output.
type Entry struct {
	Stream string // stdout or stderr
	Text   []byte // includes the newline if the line ends; valid only during the callback
	// Missing, if not 0, is the number of bytes that the log lacks here. The entry then has no text.
	Missing int64

	at []byte // the time as written in the log
}

// Missing is an error: the number of bytes of a log that were rotated away before they were read, or could not be
// written.
type Missing int64

func (m Missing) Error() string {
	return strconv.FormatInt(int64(m), 10) + " bytes of the log are missing: it was put aside faster than it was read (see --log-size), or its disk was full"
}

// Err returns m as an error, or nil if nothing is missing.
func (m Missing) Err() error {
	if m == 0 {
		return nil
	}
	return m
}

// Time returns the time when the piece was printed, or the zero time if the log has none.
func (e Entry) Time() time.Time {
	t, _ := time.Parse(time.RFC3339Nano, string(e.at))
	return t
}

// parseEntry parses a line of a log. ok is false for a line to be skipped.
func parseEntry(line []byte) (e Entry, ok bool) {
	at, rest, _ := bytes.Cut(line, []byte{' '})
	stream, rest, _ := bytes.Cut(rest, []byte{' '})
	tag, text, found := bytes.Cut(rest, []byte{' '})
	if !found || len(text) == 0 || text[len(text)-1] != '\n' {
		return Entry{}, false
	}
	e = Entry{Text: text, at: at}
	switch string(stream) {
	case "stdout":
		e.Stream = "stdout"
	case "stderr":
		e.Stream = "stderr"
	case lostStream:
		n, err := strconv.ParseInt(string(text[:len(text)-1]), 10, 64)
		return Entry{Missing: n, at: at}, err == nil && n > 0
	default:
		return Entry{}, false
	}
	switch string(tag) {
	case "F":
	case "P":
		e.Text = text[:len(text)-1]
	default:
		return Entry{}, false
	}
	return e, true
}

// beginning returns the first bytes of a file, enough for its offset line.
func beginning(f *os.File) []byte {
	b := make([]byte, 128)
	n, _ := f.ReadAt(b, 0)
	return b[:n]
}

// offsetOf returns the offset in the log of a file that begins with b, or -1 if it has no offset line.
func offsetOf(b []byte) int64 {
	line, _, _ := bytes.Cut(b, []byte{'\n'})
	_, rest, _ := bytes.Cut(line, []byte{' '})
	text, ok := bytes.CutPrefix(rest, []byte(offsetStream+" F "))
	n, err := strconv.ParseInt(string(text), 10, 64)
	if !ok || err != nil || n < 0 {
		return -1
	}
	return n
}

// Reader reads a growing log across rotations. If a file is rotated twice before the reader opens it, an entry reports
// how many bytes are missing.
type Reader struct {
	dir Dir

	mu    sync.Mutex
	files []*os.File // files still to be read, the oldest first
	full  bool       // there are newer files, but files has no room for them
	part  []byte
	pos   int64 // offset in the whole log up to which files[0] has been read; -1 if unknown
	fresh bool  // nothing of files[0] has been read yet
}

// backlog is how many files a reader holds open.
const backlog = 64

// maxLine is how much of a line a reader keeps while it looks for the end of the line.
const maxLine = 1 << 20

// NewReader returns a reader of a log, from its beginning or, with fromEnd, from its current end.
func NewReader(d Dir, fromEnd bool) (*Reader, error) {
	r := &Reader{dir: d, pos: -1, fresh: true}
	if err := r.find(); err != nil {
		return nil, err
	}
	if !fromEnd {
		return r, nil
	}
	for len(r.files) > 1 {
		_ = r.files[0].Close()
		r.files = r.files[1:]
	}
	if len(r.files) == 1 {
		r.enter(r.files[0])
		n, err := r.files[0].Seek(0, io.SeekEnd)
		if err != nil {
			r.Close()
			return nil, err
		}
		if r.pos >= 0 {
			r.pos += n
		}
	}
	return r, nil
}

// find opens the files that the reader does not have yet. It opens the current file first. If the log is rotated before
// it opens log.1, that is the same file or the next one. In the other order it could miss a file between the two.
func (r *Reader) find() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*os.File
	for _, name := range []string{r.dir.current(), r.dir.current() + ".1"} {
		f, err := r.dir.Tree.Open(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			closeFiles(found)
			return err
		case len(found) == 1 && sameFile(f, found[0]): // the watcher reports files newer than this one
			_ = f.Close()
		case len(found) == 1 && isAfter(f, found[0]):
			found = append(found, f)
		default:
			found = slices.Insert(found, 0, f)
		}
	}
	if n := len(r.files); n > 0 {
		for i, f := range found {
			if sameFile(f, r.files[n-1]) {
				closeFiles(found[:i+1])
				found = found[i+1:]
				break
			}
		}
	}
	room := max(0, backlog-len(r.files))
	if r.full = len(found) > room; r.full {
		closeFiles(found[room:])
		found = found[:room]
	}
	r.files = append(r.files, found...)
	return nil
}

// isAfter reports whether one file follows another in the log. A file without an offset line was just created.
func isAfter(a, b *os.File) bool {
	before := offsetOf(beginning(b))
	return before >= 0 && offsetOf(beginning(a)) > before
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

// Close closes the files.
func (r *Reader) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	closeFiles(r.files)
	r.files = nil
}

// current returns the oldest open file, or nil. last is true if it is the only one open, and full is true if newer
// files could not be opened.
func (r *Reader) current() (f *os.File, last, full bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.files) == 0 {
		return nil, true, false
	}
	return r.files[0], len(r.files) == 1, r.full
}

// enter begins to read a file. It returns how many bytes of the log are missing before it.
func (r *Reader) enter(f *os.File) (missing int64) {
	first := beginning(f)
	if len(first) == 0 {
		return 0 // its writer has just created it
	}
	r.fresh = false
	offset := offsetOf(first)
	if offset >= 0 && r.pos >= 0 {
		missing = max(0, offset-r.pos)
	}
	r.pos = offset
	return missing
}

// Read calls f with each new entry.
func (r *Reader) Read(f func(Entry) error) error {
	if err := r.find(); err != nil {
		return err
	}
	for {
		file, last, full := r.current()
		if file == nil {
			return nil
		}
		if r.fresh {
			if missing := r.enter(file); missing > 0 {
				if err := f(Entry{Missing: missing}); err != nil {
					return err
				}
			}
		}
		if err := r.readFile(file, f); err != nil {
			return err
		}
		switch {
		case !last:
		case !full:
			return nil
		default:
			if err := r.find(); err != nil {
				return err
			}
			continue
		}
		// The file was rotated before it was read completely, so nothing will be added to it.
		r.mu.Lock()
		r.files, r.part, r.fresh = r.files[1:], nil, true
		r.mu.Unlock()
		_ = file.Close()
	}
}

// readFile calls f with each entry of a file, up to its current end.
func (r *Reader) readFile(file *os.File, f func(Entry) error) error {
	in := bufio.NewReaderSize(file, 64<<10)
	for {
		line, err := in.ReadSlice('\n')
		if r.pos >= 0 {
			r.pos += int64(len(line))
		}
		if err != nil || len(r.part) > 0 {
			r.part = append(r.part, line...)
			line = r.part
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull) && len(r.part) < maxLine:
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
		r.part = nil
		if e, ok := parseEntry(line); ok {
			if err := f(e); err != nil {
				return err
			}
		}
	}
}

// Follow calls f with each entry until done reports that the log is complete. Whenever it has read all entries so far,
// it calls idle, unless that is nil. It opens new files as they appear, even while f runs.
func (r *Reader) Follow(ctx context.Context, w *Watcher, done func() (bool, error), f func(Entry) error, idle func() error) error {
	w.onChange(func() { _ = r.find() })
	defer w.onChange(nil)
	for {
		over, err := done() // asked before the last read, so that no entry is missed
		if err != nil {
			return err
		}
		if err := r.Read(f); err != nil {
			return err
		}
		if idle != nil {
			if err := idle(); err != nil {
				return err
			}
		}
		if over {
			return nil
		}
		if err := w.Wait(ctx, time.Second); err != nil {
			return err
		}
	}
}

// Tail keeps the entries of the last lines of a log.
type Tail struct {
	n       int
	lines   [][]Entry
	partial bool
}

// NewTail returns a Tail of n lines.
func NewTail(n int) *Tail { return &Tail{n: n} }

// Add adds an entry.
func (t *Tail) Add(e Entry) error {
	if e.Missing > 0 {
		return nil
	}
	e.Text, e.at = bytes.Clone(e.Text), bytes.Clone(e.at)
	if t.partial {
		last := len(t.lines) - 1
		t.lines[last] = append(t.lines[last], e)
	} else {
		if len(t.lines) == t.n {
			t.lines = t.lines[1:]
		}
		t.lines = append(t.lines, []Entry{e})
	}
	t.partial = len(e.Text) == 0 || e.Text[len(e.Text)-1] != '\n'
	return nil
}

// Each calls f with the entries kept.
func (t *Tail) Each(f func(Entry) error) error {
	for _, line := range t.lines {
		for _, e := range line {
			if err := f(e); err != nil {
				return err
			}
		}
	}
	return nil
}

package look

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"slices"

	"distkit/errclass"
	"distkit/layer/tree"

	"github.com/containerd/errdefs"
)

// A Usage tells how many bytes the files of an image take, and in which layers and directories.
type Usage struct {
	Layers []LayerUsage

	files *tree.Tree[sized]
	sums  sums // of the contents, if they were hashed
}

// A LayerUsage is the size of one layer and of its files.
type LayerUsage struct {
	Layer  int    `json:"layer"` // from 1 on
	Digest string `json:"digest"`
	Size   int64  `json:"size"`   // of the blob
	Files  int64  `json:"files"`  // regular files
	Bytes  int64  `json:"bytes"`  // the size of the files
	Wasted int64  `json:"wasted"` // the size of files that later entries overwrite or delete
}

// A sized file has the attributes of a file that are needed here: its size, and its layer from 0 on.
type sized struct {
	low   [3]byte
	high  uint16
	layer uint16
}

func (f *sized) size() int64 { return int64(f.high)<<24 | unpack(f.low) }

// A Waste is a file of a layer that a later entry overwrites or deletes.
type Waste struct {
	Path  string `json:"path"`
	Size  int64  `json:"size"`
	Layer int    `json:"layer"` // the layer that has the file, from 1 on
	By    int    `json:"by"`    // the layer that overwrites or deletes it
}

// UsageOptions are options for [Measure].
type UsageOptions struct {
	MaxMemory int64 // the memory that the tree may take, in bytes; 0: any
	// Wasted, if not nil, is called for each file that has content and is overwritten or deleted later.
	Wasted func(Waste)
	// Hash hashes all contents, for [Usage.Duplicates].
	Hash bool
}

// Measure merges layers and returns the usage of their files. Errors are those of [Read].
func Measure(ctx context.Context, layers []Layer, opts UsageOptions) (*Usage, error) {
	u := &Usage{Layers: make([]LayerUsage, len(layers))}
	now := 0
	u.files = tree.New(tree.Options[sized]{MaxMemory: opts.MaxMemory, Removed: func(e tree.Entry, f *sized) {
		u.Layers[f.layer].Wasted += f.size()
		if opts.Wasted != nil && f.size() > 0 {
			opts.Wasted(Waste{"/" + u.files.Path(e), f.size(), int(f.layer) + 1, now})
		}
	}})
	for i, l := range layers {
		u.Layers[i] = LayerUsage{Layer: i + 1, Digest: string(l.Digest), Size: l.Size}
	}
	hash := newHasher()
	for i := range layers { // one at a time, so that now is the layer being merged
		now = i + 1
		err := Merge(ctx, layers[i:i+1], u.files, func(_ int, _ int64, c tree.Change, h *tar.Header, content io.Reader) error {
			if c.Action != tree.Made || u.files.Kind(c.Entry) != tree.Regular {
				return nil
			}
			if h.Size > maxSize {
				return errclass.Errorf(errdefs.ErrInvalidArgument, "a file of %d bytes", h.Size)
			}
			*u.files.File(c.Entry) = sized{pack(h.Size), uint16(h.Size >> 24), uint16(i)}
			u.Layers[i].Files++
			u.Layers[i].Bytes += h.Size
			if !opts.Hash || h.Size == 0 {
				return nil
			}
			s, err := hash.sum(content)
			if err != nil {
				return err
			}
			return u.files.Charge(u.sums.set(u.files.Number(c.Entry), s))
		}, nil)
		if err != nil {
			return nil, err
		}
	}
	return u, nil
}

// A sum is the beginning of a SHA-256 digest. It is zero if the content was not hashed.
type sum [16]byte

// sums has the sums of files, by the files' numbers.
type sums []*[256]sum

func (s sums) at(file uint32) sum {
	if page := file / 256; page < uint32(len(s)) && s[page] != nil {
		return s[page][file%256]
	}
	return sum{}
}

// set sets the sum of a file, and returns the memory that this took.
func (s *sums) set(file uint32, v sum) (took int64) {
	page := int(file / 256)
	if grown := page + 1 - len(*s); grown > 0 {
		*s = append(*s, make(sums, grown)...)
		took += 16 * int64(grown)
	}
	if (*s)[page] == nil {
		(*s)[page] = new([256]sum)
		took += 256 * int64(len(sum{}))
	}
	(*s)[page][file%256] = v
	return took
}

// A hasher hashes contents, one after another.
type hasher struct {
	hash   hash.Hash
	buffer []byte
}

func newHasher() *hasher { return &hasher{sha256.New(), make([]byte, 256<<10)} }

func (h *hasher) sum(content io.Reader) (s sum, err error) {
	h.hash.Reset()
	_, err = io.CopyBuffer(h.hash, content, h.buffer)
	copy(s[:], h.hash.Sum(nil))
	return s, err
}

// A FileUsage is the usage of a file, or of a directory with everything below it.
type FileUsage struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"` // the size of regular files, each counted once, whatever the number of its names
	Files int64  `json:"files"` // the number of regular files, each counted once

	Dir   bool   `json:"-"`
	Type  Type   `json:"-"`
	Name  string `json:"-"`
	ID    uint64 `json:"-"` // identifies a file with several names; 0 for others
	Links uint32 `json:"-"`
}

// Walk calls enter for each file and directory, sorted by path, and leave for each directory after everything below it.
// Only leave gets the Bytes and Files of a directory. leave may be nil.
func (u *Usage) Walk(enter, leave func(*FileUsage) error) error {
	w := usageWalk{u, enter, leave, map[*sized]uint64{}}
	_, err := w.walk(tree.Root, "/")
	return err
}

type usageWalk struct {
	*Usage
	enter, leave func(*FileUsage) error
	seen         map[*sized]uint64 // files with several names
}

func (w *usageWalk) walk(e tree.Entry, path string) (*FileUsage, error) {
	f, kind := w.files.File(e), w.files.Kind(e)
	v := &FileUsage{Path: path, Type: types[kind], Dir: kind == tree.Dir, Name: string(w.files.Name(e)), Links: w.files.Links(e)}
	if kind == tree.Regular {
		v.Bytes, v.Files = f.size(), 1
	}
	again := false
	if v.Links > 1 {
		if v.ID, again = w.seen[f]; !again {
			v.ID = uint64(len(w.seen) + 1)
			w.seen[f] = v.ID
		}
	}
	if err := w.enter(v); err != nil || !v.Dir {
		if again {
			v.Bytes, v.Files = 0, 0
		}
		return v, err
	}
	if path == "/" {
		path = ""
	}
	for _, c := range w.files.Children(e, nil) {
		below, err := w.walk(c, path+"/"+string(w.files.Name(c)))
		if err != nil {
			return v, err
		}
		v.Bytes += below.Bytes
		v.Files += below.Files
	}
	if w.leave == nil {
		return v, nil
	}
	return v, w.leave(v)
}

// A Duplicate is a file whose content another file has, too.
type Duplicate struct {
	Content string `json:"content"` // the first 16 bytes of its SHA-256, in hexadecimal
	Path    string `json:"path"`
	Size    int64  `json:"size"`
	Layer   int    `json:"layer"` // from 1 on
}

// Duplicates returns the files that have the same content as another file. Files with the same content are adjacent,
// and the contents that take most come first. Several names of one file don't count. It needs a Usage that was measured
// with Hash.
func (u *Usage) Duplicates() ([]Duplicate, error) {
	var all []tree.Entry
	seen := map[*sized]bool{}
	var find func(tree.Entry)
	find = func(dir tree.Entry) {
		for _, e := range u.files.Children(dir, nil) {
			f := u.files.File(e)
			switch {
			case u.files.Kind(e) == tree.Dir:
				find(e)
			case u.sum(e) == sum{}, u.files.Links(e) > 1 && seen[f]:
			default:
				if u.files.Links(e) > 1 {
					seen[f] = true
				}
				all = append(all, e)
			}
		}
	}
	find(tree.Root)
	slices.SortStableFunc(all, func(a, b tree.Entry) int {
		x, y := u.sum(a), u.sum(b)
		return bytes.Compare(x[:], y[:])
	})
	var groups [][]tree.Entry
	for i := 0; i < len(all); {
		n := i + 1
		for n < len(all) && u.sum(all[n]) == u.sum(all[i]) {
			n++
		}
		if n-i > 1 {
			groups = append(groups, all[i:n])
		}
		i = n
	}
	extra := func(g []tree.Entry) int64 { return int64(len(g)-1) * u.files.File(g[0]).size() }
	slices.SortStableFunc(groups, func(a, b []tree.Entry) int { return cmp.Compare(extra(b), extra(a)) })
	var list []Duplicate
	for _, g := range groups {
		for _, e := range g {
			f := u.files.File(e)
			sum := u.sum(e)
			d := Duplicate{hex.EncodeToString(sum[:]), "/" + u.files.Path(e), f.size(), int(f.layer) + 1}
			if err := u.files.Charge(int64(len(d.Path)) + 128); err != nil {
				return nil, err
			}
			list = append(list, d)
		}
	}
	return list, nil
}

func (u *Usage) sum(e tree.Entry) sum { return u.sums.at(u.files.Number(e)) }

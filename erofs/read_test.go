package erofs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
)

// A view reads an image, with as little of the writer's code as possible, and checks what fsck.erofs and the kernel
// rely on.
type view struct {
	image   []byte
	devices [][]byte
	bits    uint8
	lines   []string
	first   map[uint64]string // the first name of each inode
	links   map[uint64]uint32 // number of names found for each inode
	want    map[uint64]uint32 // number of links that each inode claims
}

type viewed struct {
	mode        uint16
	layout      uint16
	size        int64
	union       uint32
	uid, gid    uint32
	seconds     int64
	nanoseconds uint32
	links       uint32
	xattrs      []string
	beside      int64 // offset of what follows the inode
	slot        uint64
}

var errShort = errors.New("beyond the end of the image")

// read describes the files of an image: a sorted list of one line a file, in the form of dump.
func read(image []byte, devices ...[]byte) ([]string, error) {
	v := &view{image: image, devices: devices, first: map[uint64]string{}, links: map[uint64]uint32{}, want: map[uint64]uint32{}}
	s, err := v.bytes(superOffset, superSize)
	if err != nil {
		return nil, err
	}
	if little.Uint32(s) != magic {
		return nil, errors.New("not an EROFS image")
	}
	v.bits = s[12]
	if compat := little.Uint32(s[8:]); compat&compatChecksum != 0 {
		block := bytes.Clone(image[superOffset : 1<<v.bits])
		clear(block[4:8])
		if sum := ^crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli)); sum != little.Uint32(s[4:]) {
			return nil, fmt.Errorf("checksum %x, not %x", sum, little.Uint32(s[4:]))
		}
	}
	if blocks := int64(little.Uint32(s[36:])); blocks<<v.bits != int64(len(image)) {
		return nil, fmt.Errorf("%d blocks, but %d bytes", blocks, len(image))
	}
	if n := int(little.Uint16(s[86:])); n != len(devices) {
		return nil, fmt.Errorf("%d devices, not %d", n, len(devices))
	}
	for i, d := range devices {
		slot, err := v.bytes(int64(little.Uint16(s[88:])+uint16(i))*deviceSize, deviceSize)
		if err != nil {
			return nil, err
		}
		if tag := fmt.Sprintf("%x", sha256.Sum256(d)); string(slot[:64]) != tag {
			return nil, fmt.Errorf("device has the tag %q, not %q", slot[:64], tag)
		}
		if blocks := int64(little.Uint32(slot[64:])); blocks<<v.bits != int64(len(d)) {
			return nil, fmt.Errorf("device has %d blocks, but %d bytes", blocks, len(d))
		}
	}
	root := uint64(little.Uint16(s[14:]))
	if err := v.walk("", root, root); err != nil {
		return nil, err
	}
	if n := little.Uint64(s[16:]); n != uint64(len(v.want)) {
		return nil, fmt.Errorf("%d inodes, not %d", n, len(v.want))
	}
	for slot, n := range v.want {
		if n != v.links[slot] {
			return nil, fmt.Errorf("%s says that it has %d names, not %d", v.first[slot], n, v.links[slot])
		}
	}
	slices.Sort(v.lines)
	return v.lines, nil
}

func (v *view) bytes(at, n int64) ([]byte, error) {
	if at < 0 || n < 0 || at+n > int64(len(v.image)) {
		return nil, errShort
	}
	return v.image[at : at+n], nil
}

func (v *view) inode(slot uint64) (*viewed, error) {
	at := int64(slot) * slotSize
	b, err := v.bytes(at, inodeSize)
	if err != nil {
		return nil, err
	}
	if at>>v.bits != (at+inodeSize-1)>>v.bits {
		return nil, errors.New("inode crosses a block")
	}
	format := little.Uint16(b)
	if format&1 == 0 || format>>1 != layoutPlain && format>>1 != layoutInline && format>>1 != layoutChunks {
		return nil, fmt.Errorf("format %x", format)
	}
	n := &viewed{slot: slot, layout: format >> 1, mode: little.Uint16(b[4:]), size: int64(little.Uint64(b[8:])), union: little.Uint32(b[16:]),
		uid: little.Uint32(b[24:]), gid: little.Uint32(b[28:]), seconds: int64(little.Uint64(b[32:])), nanoseconds: little.Uint32(b[40:]),
		links: little.Uint32(b[44:]), beside: at + inodeSize}
	if count := int64(little.Uint16(b[2:])); count > 0 {
		size := xattrHeader + 4*(count-1)
		x, err := v.bytes(n.beside, size)
		if err != nil {
			return nil, err
		}
		n.beside += size
		for x = x[xattrHeader:]; len(x) > 0; {
			name, value := int(x[0]), int(little.Uint16(x[2:]))
			whole := (4 + name + value + 3) &^ 3
			if whole > len(x) {
				return nil, errors.New("attribute is longer than all")
			}
			prefix, ok := map[byte]string{1: "user.", 2: accessACL, 3: defaultACL, 4: "trusted.", 6: "security."}[x[1]]
			if !ok {
				return nil, fmt.Errorf("attribute of prefix %d", x[1])
			}
			n.xattrs = append(n.xattrs, fmt.Sprintf(" %s%s=%q", prefix, x[4:4+name], x[4+name:4+name+value]))
			x = x[whole:]
		}
	}
	slices.Sort(n.xattrs)
	return n, nil
}

// content returns a file's content.
func (v *view) content(n *viewed) ([]byte, error) {
	block := int64(1) << v.bits
	whole, rest := n.size, int64(0)
	switch n.layout {
	case layoutChunks:
		return v.chunks(n)
	case layoutInline:
		rest = n.size % block
		whole -= rest
		if n.beside>>v.bits != (n.beside+rest-1)>>v.bits {
			return nil, errors.New("content beside an inode crosses a block")
		}
	}
	b, err := v.bytes(int64(n.union)<<v.bits, whole)
	if err != nil {
		return nil, err
	}
	tail, err := v.bytes(n.beside, rest)
	return slices.Concat(b, tail), err
}

func (v *view) chunks(n *viewed) ([]byte, error) {
	size := int64(1) << (v.bits + uint8(n.union&0x1f))
	at := (n.beside + chunkSize - 1) &^ (chunkSize - 1)
	var content []byte
	for from := int64(0); from < n.size; from += size {
		b, err := v.bytes(at, chunkSize)
		if err != nil {
			return nil, err
		}
		at += chunkSize
		want := min(size, n.size-from)
		if little.Uint32(b[4:]) == nullAddress {
			content = append(content, make([]byte, want)...)
			continue
		}
		source, address := v.image, int64(little.Uint32(b[4:]))<<v.bits
		if d := int(little.Uint16(b[2:])); d > len(v.devices) {
			return nil, fmt.Errorf("device %d", d)
		} else if d > 0 {
			source = v.devices[d-1]
		}
		if address+want > int64(len(source)) {
			return nil, errShort
		}
		content = append(content, source[address:address+want]...)
	}
	return content, nil
}

func (v *view) walk(path string, slot, parent uint64) error {
	n, err := v.inode(slot)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	v.want[slot] = n.links
	v.links[slot]++
	line := fmt.Sprintf("%s %o %d:%d @%d.%09d", path, n.mode, n.uid, n.gid, n.seconds, n.nanoseconds)
	switch n.mode & typeMask {
	case typeFile:
		b, err := v.content(n)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		line += fmt.Sprintf(" %d %.8x", len(b), sha256.Sum256(b))
	case typeSymlink:
		b, err := v.content(n)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		line += " -> " + string(b)
	case typeChar, typeBlock:
		line += fmt.Sprintf(" %d", n.union)
	case typeDir:
		if err := v.directory(path, n, parent); err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
	}
	if first, ok := v.first[slot]; ok {
		line += " = " + first
	} else {
		v.first[slot] = path
	}
	if path != "" {
		v.lines = append(v.lines, line+strings.Join(n.xattrs, ""))
	}
	return nil
}

func (v *view) directory(path string, n *viewed, parent uint64) error {
	b, err := v.content(n)
	if err != nil {
		return err
	}
	last, dots := "", 0
	for len(b) > 0 {
		block := b[:min(1<<v.bits, len(b))]
		b = b[len(block):]
		count := int(little.Uint16(block[8:])) / direntSize
		for i := range count {
			d := block[i*direntSize:]
			from, to := int(little.Uint16(d[8:])), len(block)
			if i+1 < count {
				to = int(little.Uint16(d[direntSize+8:]))
			}
			if from > to || to > len(block) {
				return errors.New("names of entries overlap")
			}
			name := string(bytes.TrimRight(block[from:to], "\x00"))
			if name <= last || strings.ContainsAny(name, "/\x00") || len(name) > 255 {
				return fmt.Errorf("entry %q after %q", name, last)
			}
			last = name
			slot := little.Uint64(d)
			child, err := v.inode(slot)
			if err != nil {
				return err
			}
			if kind := types[child.mode>>12]; d[10] != kind {
				return fmt.Errorf("entry %q has the type %d, not %d", name, d[10], kind)
			}
			switch name {
			case ".", "..":
				if dots++; name == "." && slot != n.slot || name == ".." && slot != parent {
					return fmt.Errorf("entry %q leads to another directory", name)
				}
				if name == "." || slot != n.slot {
					v.links[slot]++
				}
				continue
			}
			if err := v.walk(strings.TrimPrefix(path+"/"+name, "/"), slot, n.slot); err != nil {
				return err
			}
		}
	}
	if dots != 2 {
		return fmt.Errorf("%d of the entries . and ..", dots)
	}
	return nil
}

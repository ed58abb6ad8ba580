package layers

import (
	"archive/tar"
	"fmt"
	"path"
	"strings"
	"time"
)

type entry struct {
	tar.Header
	body string
}

type testCase struct {
	name         string
	below, layer []entry
	// differs has, for each peer whose result differs, the reason why distkit does not do the same.
	differs map[string]string
}

// marks reports whether the layer has whiteouts, which tar extracts as files.
func (c testCase) marks() bool {
	for _, e := range c.layer {
		if strings.HasPrefix(path.Base(e.Name), ".wh.") {
			return true
		}
	}
	return false
}

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

func file(name, body string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body: body}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

func device(kind byte, name string, major, minor int64) entry {
	return entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: 0o640, Devmajor: major, Devminor: minor}}
}

func (e entry) with(change func(*tar.Header)) entry {
	change(&e.Header)
	return e
}

func (e entry) mode(m int64) entry { e.Mode = m; return e }

func (e entry) owner(uid, gid int) entry { e.Uid, e.Gid = uid, gid; return e }

func (e entry) at(seconds int) entry {
	e.ModTime = then.Add(time.Duration(seconds) * time.Second)
	return e
}

func (e entry) xattr(name, value string) entry {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	return e
}

// npm is a tree like those that npm makes: many small files in deep directories, with links to programs.
func npm() []entry {
	var list []entry
	for p := range 40 {
		d := fmt.Sprintf("usr/lib/node_modules/p%d", p)
		if p%4 == 3 {
			d = fmt.Sprintf("usr/lib/node_modules/p%d/node_modules/p%d", p-1, p)
		}
		if p%4 == 3 {
			list = append(list, dir(path.Dir(d), 0o755))
		}
		list = append(list, dir(d, 0o755).at(p), dir(d+"/lib", 0o755))
		for f := range 25 {
			list = append(list, file(fmt.Sprintf("%s/lib/f%d.js", d, f), strings.Repeat(fmt.Sprintf("exports.f%d = %d;\n", f, p), f*f/3)).at(f))
		}
		list = append(list, file(d+"/package.json", fmt.Sprintf(`{"name": "p%d"}`, p)), file(d+"/cli.js", "#!/usr/bin/env node\n").mode(0o755),
			symlink(fmt.Sprintf("usr/bin/p%d", p), "../../"+d+"/cli.js"))
	}
	return list
}

var capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

var below = []entry{
	dir("d", 0o2751).owner(3, 4).at(1).xattr("user.below", "1"), file("d/f", "below").at(2), file("d/g", "below"),
	dir("d/e", 0o700).at(3), file("d/e/f", "below"), symlink("s", "d"), symlink("dead", "nowhere"), file("f", "below"), hardlink("h", "f"),
}

const (
	keepsTimes    = `it gets the time of the extraction: its own layer says its time, and the tree would depend on the clock`
	allAttributes = `it adds the entry's extended attributes to what is there: the entry names them all (image-spec, "Applying Changesets")`
	leavesDir     = `it sets a directory's time once the archive leaves the directory, and entries that come back change it`
	aboveRoot     = `it refuses the name: there is nothing above the root, and containerd and umoci take it as that`
	ownEntries    = `it deletes what the same layer wrote below, if that is deep or came first; and see the lower's attributes above`
)

var cases = []testCase{
	{name: "files of all kinds", layer: []entry{
		dir("d", 0o755).at(5), file("d/f", "body").owner(1, 2).mode(0o640), file("d/setuid", "x").mode(0o6755).owner(5, 6), file("d/none", "x").mode(0),
		dir("sticky", 0o1777), symlink("d/s", "f").owner(7, 8), symlink("d/absolute", "/etc/passwd"), hardlink("d/h", "d/f").mode(0o640).owner(1, 2),
		device(tar.TypeChar, "d/c", 1, 3), device(tar.TypeBlock, "d/b", 8, 300), device(tar.TypeFifo, "d/p", 0, 0), file("d/empty", ""),
		file("d/"+strings.Repeat("long", 60), "x"), file(strings.Repeat("deep/", 60)+"f", "x"), file("d/\u00fcml\u00e4ut", "x"), file("d/ \t\\\"'", "x"),
		file("d/old", "x").at(-1e9), file("d/large", strings.Repeat("0123456789abcdef", 20000)), dir("locked", 0), file("locked/f", "x"),
	}, differs: map[string]string{"tar": leavesDir}},
	{name: "a tree of npm's", layer: npm(), differs: map[string]string{"tar": leavesDir}},
	{name: "extended attributes", layer: []entry{
		file("f", "x").xattr("user.a", "1"), dir("d", 0o755).xattr("user.a", "\x00\xff"),
		file("ping", "x").mode(0o755).owner(1, 1).xattr("security.capability", capability), file("t", "x").xattr("trusted.a", "1"),
	}, differs: map[string]string{"containerd": `it sets none of trusted.*, which only root could: we are root`}},
	{name: "directories without an entry", layer: []entry{file("a/b/c", "x")}},
	{name: "a directory of a lower layer without an entry", below: below, layer: []entry{file("d/new", "x"), file("d/e/new", "x")}, differs: map[string]string{"containerd": keepsTimes, "go-archive": keepsTimes, "tar": keepsTimes}},
	{name: "a directory of a lower layer with an entry", below: below, layer: []entry{dir("d", 0o711).at(9), file("d/new", "x")}, differs: map[string]string{"containerd": allAttributes, "go-archive": allAttributes, "tar": allAttributes}},
	{name: "a directory's entry after what is in it", layer: []entry{file("d/f", "x"), dir("d", 0o750).owner(1, 1)}},
	{name: "a file again", below: below, layer: []entry{file("f", "new").mode(0o600).owner(9, 9)}},
	{name: "a hard link of a lower layer changed", below: below, layer: []entry{file("h", "new")}},
	{name: "a file twice", layer: []entry{file("f", "1").mode(0o600), hardlink("h", "f").mode(0o600), file("f", "2")}},
	{name: "a hard link to a lower layer", below: below, layer: []entry{hardlink("new", "d/f").at(2)}},
	{name: "a hard link's entry with other attributes", layer: []entry{file("f", "x"), hardlink("h", "f").mode(0o600).owner(1, 1).at(9)}, differs: map[string]string{"containerd": `they set mode and time by the link, whose header repeats or omits them: the file's own entry counts`, "go-archive": `they set mode and time by the link, whose header repeats or omits them: the file's own entry counts`}},
	{name: "a hard link with an absolute name", layer: []entry{file("f", "x"), hardlink("h", "/f")}},
	{name: "a hard link to a symbolic link", layer: []entry{file("f", "x"), symlink("s", "f"), hardlink("h", "s")}},
	{name: "a hard link over a file", below: below, layer: []entry{file("n", "x"), hardlink("f", "n")}},
	{name: "a directory over a symbolic link", below: below, layer: []entry{dir("s", 0o755), file("s/f", "x")}},
	{name: "a directory over a file", below: below, layer: []entry{dir("f", 0o755), file("f/f", "x")}},
	{name: "a file over a directory", below: below, layer: []entry{file("d", "x")}, differs: map[string]string{"tar": `it does not replace a directory that is not empty: a changeset must`}},
	{name: "a symbolic link over a directory", below: below, layer: []entry{symlink("d", "f")}, differs: map[string]string{"tar": `it does not replace a directory that is not empty: a changeset must`}},
	{name: "a file over a symbolic link", below: below, layer: []entry{file("s", "x"), file("dead", "x")}},
	{name: "through a symbolic link", below: below, layer: []entry{file("s/new", "x"), dir("s/dir", 0o700)}, differs: map[string]string{"containerd": keepsTimes, "go-archive": keepsTimes, "tar": `the time is as above, and a new directory inherits the set-group-ID bit: the entry says the mode`}},
	{name: "through an absolute symbolic link", layer: []entry{dir("d", 0o755), symlink("s", "/d"), file("s/f", "x")}, differs: map[string]string{"tar": `it follows links out of the target or not at all: the target is the root`}},
	{name: "through a symbolic link to nothing", below: below, layer: []entry{file("dead/f", "x")}, differs: map[string]string{"tar": `the directory is made where the link leads, inside the target, as by the others`}},
	{name: "names with . and /", layer: []entry{dir(".", 0o755), dir("./d", 0o755), file("./d/./f", "x"), file("/g", "x"), file("d//h", "x")}, differs: map[string]string{"tar": leavesDir}},
	{name: "names with ..", layer: []entry{dir("d", 0o755), file("d/../f", "x")}, differs: map[string]string{"tar": `it refuses ..: inside the target it harms nobody, and the others take it`}},
	{name: "names above the root", layer: []entry{file("../f", "x")}, differs: map[string]string{"go-archive": aboveRoot, "tar": aboveRoot}},
	{name: "a whiteout of a file", below: below, layer: []entry{file(".wh.f", ""), file("d/.wh.g", "")}, differs: map[string]string{"containerd": keepsTimes, "go-archive": keepsTimes}},
	{name: "a whiteout of a directory", below: below, layer: []entry{file(".wh.d", "")}},
	{name: "a whiteout of a symbolic link", below: below, layer: []entry{file(".wh.s", "")}},
	{name: "a whiteout of nothing", below: below, layer: []entry{file(".wh.no", ""), file("no/.wh.no", "")}, differs: map[string]string{"umoci": `it makes no directory for a whiteout: containerd and go-archive do`}},
	{name: "a whiteout through a symbolic link", below: below, layer: []entry{file("s/.wh.f", "")}, differs: map[string]string{"containerd": keepsTimes, "go-archive": keepsTimes}},
	{name: "a whiteout, then the name again", below: below, layer: []entry{file(".wh.d", ""), dir("d", 0o755), file("d/n", "x")}},
	{name: "a name, then its whiteout", below: below, layer: []entry{file("f", "new"), file(".wh.f", "")}, differs: map[string]string{"containerd": `whiteouts hide lower layers only, wherever they stand (image-spec, "Whiteouts")`, "go-archive": `whiteouts hide lower layers only, wherever they stand (image-spec, "Whiteouts")`}},
	{name: "an opaque directory, marked first", below: below, layer: []entry{dir("d", 0o755), file("d/.wh..wh..opq", ""), file("d/n", "x")}, differs: map[string]string{"containerd": allAttributes, "go-archive": allAttributes}},
	{name: "an opaque directory, marked last", below: below, layer: []entry{dir("d", 0o755), file("d/n", "x"), file("d/e/n", "x"), file("d/.wh..wh..opq", "")}, differs: map[string]string{"containerd": ownEntries, "go-archive": ownEntries, "umoci": keepsTimes}},
	{name: "an opaque directory without an entry", below: below, layer: []entry{file("d/.wh..wh..opq", "")}, differs: map[string]string{"containerd": keepsTimes, "go-archive": keepsTimes}},
	{name: "an opaque root", below: below, layer: []entry{file(".wh..wh..opq", ""), file("n", "x")}},
	{name: "what aufs kept", below: below, layer: []entry{dir(".wh..wh.plnk", 0o700), file(".wh..wh.aufs", "")}},
	{name: "an entry of an unknown type", layer: []entry{file("f", "x"), entry{Header: tar.Header{Typeflag: 'Z', Name: "z", Mode: 0o644}}}, differs: map[string]string{"tar": `it takes the entry for a file: what it was to be nobody knows`}},
	{name: "an overlay attribute", layer: []entry{dir("d", 0o755).xattr("trusted.overlay.opaque", "y")}, differs: map[string]string{"go-archive": `the tree would hide or redirect, once it is a layer of an overlay mount`, "tar": `the tree would hide or redirect, once it is a layer of an overlay mount`}},
	{name: "a time before 1970", layer: []entry{file("f", "x").at(-1486094706 - 1000)}, differs: map[string]string{"containerd": `they make it 1970: file systems have such times`, "go-archive": `they make it 1970: file systems have such times`}},
	{name: "a time with a fraction", layer: []entry{file("f", "x").with(func(h *tar.Header) { h.ModTime = then.Add(123456789) })}},
}

package main

import (
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	const events = `{"Action":"run","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"chatter of what passes\n"}
{"Action":"pass","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestBad","Output":"    x_test.go:3: wrong\n"}
{"Action":"output","Package":"p","Test":"TestSkips","Output":"    x_test.go:9: no crun\n"}
{"Action":"output","Package":"p","Test":"TestBad","Output":"--- FAIL: TestBad (0.00s)\n"}
{"Action":"fail","Package":"p","Test":"TestBad"}
{"Action":"skip","Package":"p","Test":"TestSkips"}
{"Action":"output","Package":"p","Test":"TestDeep/a/b","Output":"    x_test.go:7: deep\n"}
{"Action":"fail","Package":"p","Test":"TestDeep/a/b"}
{"Action":"fail","Package":"p","Test":"TestDeep/a"}
{"Action":"fail","Package":"p","Test":"TestDeep"}
{"Action":"output","Package":"p","Output":"FAIL\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.01s\n"}
{"Action":"fail","Package":"p"}
{"Action":"output","Package":"q","Output":"PASS\n"}
{"Action":"output","Package":"q","Output":"ok  \tq\t0.01s\n"}
{"Action":"pass","Package":"q"}
{"Action":"output","Package":"r","Output":"?   \tr\t[no test files]\n"}
{"Action":"skip","Package":"r"}
{"Action":"output","Package":"s","Output":"FAIL\ts [build failed]\n"}
{"Action":"fail","Package":"s"}
{"Action":"output","Package":"u","Test":"TestScript","Output":"    testscript.go:609: \n        > status 3 ls x\n        [stderr]\n        gone\n        FAIL: a.txtar:2: status 0, not 3\n"}
{"Action":"fail","Package":"u","Test":"TestScript"}
`
	var out strings.Builder
	s := summary{out: &out, output: map[string]*strings.Builder{}, reasons: map[string]int{}}
	for line := range strings.Lines(events) {
		s.line(line)
	}
	s.close()
	const want = "    x_test.go:3: wrong\n--- FAIL: TestBad (0.00s)\n    x_test.go:7: deep\nFAIL\nFAIL\tp\t0.01s\nok  \tq\t0.01s\nFAIL\ts [build failed]\n" +
		"    testscript.go:609: \n        > status 3 ls x\n        [stderr]\n        gone\n        FAIL: a.txtar:2: status 0, not 3\n" +
		"skipped 1: no crun\nfailed: p TestBad: wrong\nfailed: p TestDeep/a/b: deep\nfailed: s: no reason given\n" +
		"failed: u TestScript: a.txtar:2: status 0, not 3, after: testscript.go:609: > status 3 ls x [stderr] gone\n" +
		"1 passed, 5 failed, 1 skipped\n"
	if out.String() != want {
		t.Errorf("got %q\nwant %q", out.String(), want)
	}
}

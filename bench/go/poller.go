// Go anchor of the poll loop: GET pages of 200 records with encoding/json (typed), aggregate, render.
//
// usage: poller URL SCOPES CONCURRENCY
// prints one JSON object: wall seconds, CPU seconds (self), pages, rows, bytes of the rendered text
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

type row struct {
	ID         int64 `json:"job_instance_id"`
	EndTime    int64 `json:"end_time"`
	TotalTime  int64 `json:"total_time"`
	LaunchMode int   `json:"launch_mode"`
	Status     int   `json:"status"`
	Type       int   `json:"type"`
}
type page struct {
	Data struct {
		List []row `json:"job_instance_list"`
	} `json:"data"`
}
type key struct{ t, m, s int }
type agg struct{ n, ms, last int64 }

func main() {
	url := os.Args[1]
	scopes, _ := strconv.Atoi(os.Args[2])
	conc, _ := strconv.Atoi(os.Args[3])
	cl := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: conc, DisableCompression: true}}
	work := make(chan int)
	var wg sync.WaitGroup
	var mu sync.Mutex
	rows, size := 0, 0
	t0 := time.Now()
	for i := 0; i < conc; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for s := range work {
				resp, err := cl.Get(url + "&bk_scope_id=" + strconv.Itoa(s))
				if err != nil {
					panic(err)
				}
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				var p page
				if err := json.Unmarshal(b, &p); err != nil {
					panic(err)
				}
				m := map[key]*agg{}
				seen := make(map[int64]struct{}, len(p.Data.List))
				for _, r := range p.Data.List {
					if _, dup := seen[r.ID]; dup {
						continue
					}
					seen[r.ID] = struct{}{}
					k := key{r.Type, r.LaunchMode, r.Status}
					a := m[k]
					if a == nil {
						a = &agg{}
						m[k] = a
					}
					a.n++
					a.ms += r.TotalTime
					if r.EndTime > a.last {
						a.last = r.EndTime
					}
				}
				var out bytes.Buffer
				for k, a := range m {
					fmt.Fprintf(&out, "blueking_job_instances_total{bk_scope_type=\"biz\",bk_scope_id=\"%d\",task_type=\"%d\",launch_mode=\"%d\",status=\"%d\"} %d\n", s, k.t, k.m, k.s, a.n)
					fmt.Fprintf(&out, "blueking_job_seconds_total{bk_scope_type=\"biz\",bk_scope_id=\"%d\",task_type=\"%d\",launch_mode=\"%d\",status=\"%d\"} %g\n", s, k.t, k.m, k.s, float64(a.ms)/1000)
					fmt.Fprintf(&out, "blueking_job_last_end_seconds{bk_scope_type=\"biz\",bk_scope_id=\"%d\",task_type=\"%d\",launch_mode=\"%d\",status=\"%d\"} %g\n", s, k.t, k.m, k.s, float64(a.last)/1000)
				}
				mu.Lock()
				rows += len(p.Data.List)
				size += out.Len()
				mu.Unlock()
			}
		}()
	}
	for s := 0; s < scopes; s++ {
		work <- s
	}
	close(work)
	wg.Wait()
	var ru syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	cpu := float64(ru.Utime.Sec+ru.Stime.Sec) + float64(ru.Utime.Usec+ru.Stime.Usec)/1e6
	fmt.Printf("{\"wall\": %f, \"cpu\": %f, \"pages\": %d, \"rows\": %d, \"rendered\": %d}\n", time.Since(t0).Seconds(), cpu, scopes, rows, size)
}
